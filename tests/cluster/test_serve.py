"""`octet serve` as a user runs it: a process of its own, started and stopped."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from cluster.fault_points import pid_of
from cluster.inventory import inventory
from cluster.launch import RunningCluster
from octet.client import Client
from tests.clusters import DECODE_PLACES, OBJECT_STORE_BYTES, wait_until

_START_S = 180.0
_OCTET = str(pathlib.Path(sys.executable).parent / "octet")


@contextlib.contextmanager
def _serving(*args: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [_OCTET, "serve", "--grpc-port", "0", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], _START_S)[0], f"nothing said within {_START_S} s"
        line = process.stdout.readline()
        assert line, process.communicate(timeout=10)[1]
        ready = re.match(r"octet: ready grpc=(\S+) ", line)
        assert ready, line
        yield process, ready[1]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def _descendants(pid: int) -> set[int]:
    """Every process below `pid`."""
    children: dict[int, list[int]] = {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found.update(below)
        waiting += below
    return found


def _alive(pids: set[int]) -> set[int]:
    alive = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                alive.add(pid)
    return alive


def test_sigterm_drains_and_leaves_no_process_behind() -> None:
    """Also where all of its group are sent it, as `timeout` and service managers do."""
    with _serving("--experts", "1") as (process, address):
        with Client(address, timeout_s=60) as client:
            stream = client.stream("the last words", max_new_tokens=150, ignore_eos=True)
            num_tokens = len(next(stream).token_ids)
            below = _descendants(process.pid)
            os.killpg(process.pid, signal.SIGTERM)
            num_tokens += sum(len(chunk.token_ids) for chunk in stream)
        assert num_tokens == 150, "a live request ends in its own time"
        assert process.wait(timeout=40) == 0
    assert len(below) > 5, "the pools ran below the command"
    deadline_s = time.monotonic() + 10
    while _alive(below) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert not _alive(below)


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        # Ray starts, which sets handlers of its own meanwhile.
        ("starting Ray", signal.SIGTERM),
        # Ray has started, and the controller is about to. Later moments may be too short for a line.
        ("starting the controller", signal.SIGTERM),
        ("starting the controller", signal.SIGINT),
    ],
)
def test_a_start_that_is_interrupted_is_no_failure_and_leaves_no_process_behind(
    moment: str, number: signal.Signals
) -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [_OCTET, "serve", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OCTET_TEST": mark},
    )
    try:
        assert process.stderr is not None
        said = next((line for line in process.stderr if moment in line), "")
        assert said, "it ended before"
        process.send_signal(number)
        out, told = process.communicate(timeout=90)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=30)
    assert process.returncode == 0, told
    assert "octet: ready" not in out
    assert "octet: stopped before it served" in told
    wait_until(lambda: not _alive(_marked(mark)), 20, "nothing lives on")


def _marked(mark: str) -> set[int]:
    """Every process with this in its environment."""
    found = set()
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes():
                    found.add(int(entry.name))
    return found


def test_a_bad_flag_ends_with_one_line_and_exit_code_1() -> None:
    done = subprocess.run(
        [_OCTET, "serve", "--set", "pools.prefil.size=2"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "did you mean 'pools.prefill'?" in " ".join(done.stderr.split())


def test_serve_joins_a_ray_cluster_and_ctrl_c_leaves_it_running(nodes: Cluster, embedded: RunningCluster) -> None:
    """Beside a cluster of another driver, which does not notice."""
    with _another(nodes) as node:
        flags = [
            "--set",
            f"pools.decode.resources={{{DECODE_PLACES}: 1}}",
            "--set",
            "pools.experts.resources={away: 1}",
        ]
        with _serving("--address", nodes.address, *flags) as (process, address):
            with Client(address, timeout_s=60) as client:
                assert client.generate("across nodes", max_new_tokens=8).usage.completion_tokens == 8
                hosts = {pool.name: {member.node_id for member in pool.members} for pool in client.status().pools}
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=40) == 0
        assert hosts["experts"] == {node.node_id}
        assert not hosts["decode"] & hosts["experts"]
        assert all(node.all_processes for node in nodes.list_all_nodes())
    with Client(embedded.address, timeout_s=60) as client:
        assert client.status().state == "READY"


def test_serve_that_is_killed_leaves_nothing_on_the_ray_that_it_joined(nodes: Cluster, ray_session: None) -> None:
    namespace = "octet-killed"
    before = inventory(namespace)
    with _serving("--address", nodes.address, "--experts", "1", "--set", f"ray.namespace={namespace}") as serving:
        process, address = serving
        with Client(address, timeout_s=60) as client:
            pids = {member.pid for pool in client.status().pools for member in pool.members}
        pids |= {pid_of(namespace, name) for name in ("controller", "frontend-0", "router")}
        assert len(_alive(pids)) == 6
        process.kill()
        wait_until(lambda: not _alive(pids), 60, "nothing lives on")
        # Ray hears of the last of them a little later.
        wait_until(lambda: inventory(namespace) == before, 30, "nothing is reserved, or known to Ray")


@contextlib.contextmanager
def _another(nodes: Cluster) -> Iterator[Any]:
    """A node that expert shards are pinned to."""
    node = nodes.add_node(num_cpus=4, resources={"away": 2}, object_store_memory=OBJECT_STORE_BYTES)
    yield node
    nodes.remove_node(node)
