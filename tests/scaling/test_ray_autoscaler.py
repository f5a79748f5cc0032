"""Ray's own autoscaler starts nodes for members that no node has room for, and takes them away again."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import ray

from octet.client import Client
from tests.clusters import DECODE_PLACES, OBJECT_STORE_BYTES, members

_BIN = pathlib.Path(sys.executable).parent
_HEAD, _HEAD_TYPE = "head", "ray.head.default"  # The latter is the fake provider's own word.
_START_S, _GONE_S = 120.0, 90.0
_NODES_UNTIL = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline_s = time.monotonic() + float(sys.argv[3])
while (alive := sum(node["Alive"] for node in ray.nodes())) != int(sys.argv[2]):
    assert time.monotonic() < deadline_s, f"{alive} nodes"
    time.sleep(0.2)
"""


def _types(address: str) -> dict[str, object]:
    """A head that holds no decode worker, and nodes, started on demand, that hold one each."""
    nothing = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "on-demand",
        "max_workers": 3,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.3,
        # Ray's provider whose nodes are raylets on this machine.
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": address,
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in nothing},
        "head_node_type": _HEAD_TYPE,
        "available_node_types": {
            _HEAD_TYPE: {"resources": {"CPU": 4, _HEAD: 1}, "node_config": {}, "max_workers": 0},
            "decode": {
                "resources": {"CPU": 1, DECODE_PLACES: 1},
                "node_config": {},
                "min_workers": 0,
                "max_workers": 3,
            },
        },
    }


@pytest.fixture
def environment() -> dict[str, str]:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, **token}


@pytest.fixture
def address(tmp_path: pathlib.Path, environment: dict[str, str]) -> Iterator[str]:
    """Of a head with Ray's autoscaler, which looks once a second."""
    host = ray.util.get_node_ip_address()
    with socket.create_server((host, 0)) as free:
        address = f"{host}:{free.getsockname()[1]}"
    types = tmp_path / "types.json"
    types.write_text(json.dumps(_types(address)))
    command = [
        str(_BIN / "ray"),
        "start",
        "--head",
        "--block",
        f"--port={address.rsplit(':')[-1]}",
        f"--autoscaling-config={types}",
        "--num-cpus=4",
        f"--resources={json.dumps({_HEAD: 1})}",
        "--include-dashboard=false",
        f"--object-store-memory={OBJECT_STORE_BYTES}",
    ]
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with (tmp_path / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=environment | fake, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield address
    finally:
        # The nodes that it started are of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, signal.SIGKILL)
        head.wait(10)


@pytest.fixture
def nodes_until(address: str, environment: dict[str, str]) -> Callable[[int, float], None]:
    """Waits until so many nodes are alive."""

    def wait(count: int, timeout_s: float) -> None:
        command = [sys.executable, "-c", _NODES_UNTIL, address, str(count), str(timeout_s)]
        subprocess.run(command, env=environment, check=True, timeout=timeout_s + 60)

    return wait


@pytest.mark.long
def test_nodes_come_for_members_that_wait_and_go_when_these_have_left(
    address: str, environment: dict[str, str], nodes_until: Callable[[int, float], None]
) -> None:
    nodes_until(1, _START_S)
    places = {"prefill": {_HEAD: 0.1}, "experts": {_HEAD: 0.1}, "decode": {DECODE_PLACES: 1}}
    settings = [f"pools.{pool}.resources={json.dumps(wanted)}" for pool, wanted in places.items()]
    flags = [f"--set={setting}" for setting in (*settings, "kv.memory_gib=0.05")]
    serving = subprocess.Popen(
        [str(_BIN / "octet"), "serve", "--address", address, "--grpc-port", "0", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert serving.stdout is not None
        ready = re.match(r"octet: ready grpc=(\S+) ", serving.stdout.readline())
        assert ready, "it does not serve"
        nodes_until(2, 10)
        with Client(ready[1], timeout_s=_START_S) as client:
            before = client.generate("Once", max_new_tokens=8, temperature=0.0).choices[0].token_ids
            client.scale(decode=3)
            nodes = {member.node_id for member in members(client.status(), "decode").values()}
            assert len(nodes) == 3, "each on a node of its own"
            nodes_until(4, 10)
            assert client.generate("Once", max_new_tokens=8, temperature=0.0).choices[0].token_ids == before
            client.scale(decode=1)
            nodes_until(2, _GONE_S)
            assert client.generate("Once", max_new_tokens=8, temperature=0.0).choices[0].token_ids == before
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
    finally:
        serving.kill()
        serving.communicate(timeout=10)
