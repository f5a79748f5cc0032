"""Facts: added up from the status, from Ray's inventory, and from this machine's processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

from cluster.inventory import Inventory
from octet.v1 import octet_pb2 as pb
from ops.chaos.observe import facts_of, num_ports, state_of

STATUS = pb.GetStatusResponse(
    state="READY",
    epoch=3,
    live_requests=2,
    pools=[
        pb.Pool(
            name="decode",
            members=[
                pb.Member(worker_id="decode-0", kv_pages_total=9, kv_pages_free=4, leases=1, running=2, waiting=1),
                pb.Member(worker_id="decode-1", kv_pages_total=9, kv_pages_free=8, state="STANDBY"),
            ],
        ),
        pb.Pool(name="experts", members=[pb.Member(worker_id="experts-0", num_held=20)]),
    ],
)
INVENTORY = Inventory(actors=frozenset({"decode-0", "decode-1", "experts-0", "controller", "frontend-0"}), bundles=3)


def test_facts_are_added_up_over_the_members_that_serve() -> None:
    facts = facts_of(STATUS, INVENTORY, {7: "DecodeWorker", 8: "DecodeWorker", 9: "Router"}, 12, 16, 4)
    assert (facts.state, facts.epoch, facts.live_requests) == ("READY", 3, 2)
    assert facts.sizes == {"decode": 1, "experts": 1}
    assert (facts.pages, facts.leases, facts.sequences) == (5, 1, 3)
    assert (facts.slots, facts.least_slots, facts.most_slots) == (20, 16, 20)
    assert facts.actors == {"decode": 2, "experts": 1, "controller": 1, "frontend": 1}
    assert facts.processes == {"DecodeWorker": 2, "Router": 1}
    assert (facts.bundles, facts.ports) == (3, 12)


def test_ports_are_those_that_a_process_listens_on() -> None:
    before = num_ports([os.getpid()])
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert num_ports([os.getpid()]) == before + 1
        with socket.create_connection(server.getsockname()):
            assert num_ports([os.getpid()]) == before + 1
    assert num_ports([os.getpid()]) == before
    assert num_ports([2**22 + 1]) == 0


def test_a_process_runs_or_is_stopped_or_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True); input()"], stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert state_of(process.pid) not in ("", "T")
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert state_of(process.pid) == "T"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert state_of(process.pid) == "", "a zombie is gone"
    assert state_of(process.pid) == ""
