"""The host of Ray's head dies under a cluster on another host, and comes back with what an external Redis has kept.

A program of its own, since threads of gRPC stay on the host on which they were started: `test_head.py` runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping

import ray

from cluster.launch import RunningCluster, launch
from octet.client import Client
from octet.config import load_config
from ops.chaos.cable import ADDRESSES, Cable, Host, cable
from tests.clusters import OBJECT_STORE_BYTES, Traffic, at_baseline, members, settled, wait_until

_RAY, _REDIS = 6379, 6380
_FIELDS = ("frontend.port=0", "kv.memory_gib=0.05", "pools.decode.size=2", "pools.experts.size=2")
_QUIET_S, _DOWN_S, _TELL_S, _START_S = 4.0, 6.0, 30.0, 60.0


def main(model_dir: str, answers_file: str) -> None:
    answers = {tuple(prompt): answer for prompt, answer in json.loads(pathlib.Path(answers_file).read_text())}
    with (
        cable() as laid,
        tempfile.TemporaryDirectory(prefix="oct-", dir="/tmp", ignore_cleanup_errors=True) as directory,
        laid.here("far"),
    ):
        try:
            _start_redis(laid, directory)
            head = _start_head(laid, directory)
            _start_node(laid, directory)
            with _cluster(f"model.path={model_dir}") as cluster, Traffic(cluster.address, answers, 3) as traffic:
                _lose(head, lambda: _start_head(laid, directory), cluster, traffic)
        finally:
            # Before the directory, into which they write.
            laid.remove()


def _lose(
    head: subprocess.Popen[bytes],
    start_again: Callable[[], subprocess.Popen[bytes]],
    cluster: RunningCluster,
    traffic: Traffic,
) -> None:
    with Client(cluster.address, timeout_s=60) as client:
        traffic.flow()
        quiet_s = _gap_s(traffic, _QUIET_S)
        # With the process that is the first of its namespace, all others there end.
        head.kill()
        head.wait()
        gone_s = _gap_s(traffic, _DOWN_S)
        assert client.status().state == "READY", "nobody on this host is missed"

        lost, victim = next(iter(members(client.status(), "decode").items()))
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: lost not in members(client.status(), "decode"), _TELL_S, "its loss is seen without the head")
        loss_s = _gap_s(traffic, _QUIET_S)

        start_again()
        begun_s = time.monotonic()
        wait_until(lambda: settled(client, decode=2), _TELL_S + _START_S, "it is replaced, with the head there again")
        replaced_s = time.monotonic() - begun_s
        client.scale(experts=3)
        traffic.flow()
        assert settled(client, prefill=1, decode=2, experts=3)
        assert client.status().requests_failed == 0
        print(
            f"longest gap {quiet_s * 1e3:.0f} ms with the head, {gone_s * 1e3:.0f} ms around its loss, "
            f"{loss_s * 1e3:.0f} ms around that of a decode worker without it, "
            f"{traffic.longest_gap_s() * 1e3:.0f} ms from its return on; the decode worker was replaced "
            f"{replaced_s:.1f} s after that began",
            flush=True,
        )


def _gap_s(traffic: Traffic, duration_s: float) -> float:
    """The longest of that time, and of an answer to every user."""
    time.sleep(duration_s)
    traffic.flow()
    return traffic.longest_gap_s()


@contextlib.contextmanager
def _cluster(*overrides: str) -> Iterator[RunningCluster]:
    """Of which everything is on this host. At the end nothing is held."""
    wait_until(_connected, _START_S, "Ray's nodes are there")
    cluster = launch(load_config(overrides=[*_FIELDS, *overrides]))
    try:
        yield cluster
        with Client(cluster.address, timeout_s=60) as client:
            wait_until(lambda: at_baseline(client.status()), _TELL_S, "every page is given back")
    finally:
        cluster.stop(drain=False)
        ray.shutdown()


def _connected() -> bool:
    try:
        # Both nodes are on this machine, for all that Ray can see.
        ray.init(f"{ADDRESSES['near']}:{_RAY}", _node_ip_address=ADDRESSES["far"], log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError):
        return False
    return True


def _start_redis(laid: Cable, directory: str) -> None:
    command = ["redis-server", "--bind", ADDRESSES["far"], "--port", str(_REDIS), "--protected-mode", "no"]
    subprocess.Popen([*laid.command("far"), *command, "--save", "", "--dir", directory], stdout=subprocess.DEVNULL)


def _start_head(laid: Cable, directory: str) -> subprocess.Popen[bytes]:
    # A host has its processes to itself: Ray takes for its own what it sees of another head.
    apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    options = ["--head", f"--port={_RAY}", "--include-dashboard=false", "--num-cpus=0"]
    redis = {"RAY_REDIS_ADDRESS": f"{ADDRESSES['far']}:{_REDIS}"}
    return _start_ray([*laid.command("near"), *apart], "near", directory, options, redis)


def _start_node(laid: Cable, directory: str) -> None:
    options = [f"--address={ADDRESSES['near']}:{_RAY}", "--num-cpus=16"]
    _start_ray(laid.command("far"), "far", directory, options, {})


def _start_ray(
    within: list[str], host: Host, directory: str, options: list[str], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ADDRESSES[host]}"]
    sizes = [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={directory}/{host}"]
    return subprocess.Popen(
        [*within, *start, *sizes, *options],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
