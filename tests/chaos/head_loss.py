"""The host of Ray's head dies under a cluster on another host, and comes back with what an external Redis has kept.

Or that Redis dies, and the head with it, for Ray's GCS does not go on without; then both come back.

A program of its own, since threads of gRPC stay on the host on which they were started: `test_head.py` runs it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import ray

from cluster.launch import RunningCluster, launch
from octet.client import Client
from octet.config import load_config
from ops.chaos.cable import ADDRESSES, Cable, Host, cable
from tests.clusters import OBJECT_STORE_BYTES, Traffic, at_baseline, members, settled, wait_until

_RAY, _REDIS = 6379, 6380
_FIELDS = ("frontend.port=0", "kv.memory_gib=0.05", "pools.decode.size=2", "pools.experts.size=2")
_QUIET_S, _DOWN_S, _TELL_S, _START_S = 4.0, 6.0, 30.0, 60.0


def main(who: str, model_dir: str, answers_file: str) -> None:
    """
    Args:
        who: is lost, "head" or "redis".
    """
    answers = {tuple(prompt): answer for prompt, answer in json.loads(pathlib.Path(answers_file).read_text())}
    with (
        cable() as laid,
        tempfile.TemporaryDirectory(prefix="oct-", dir="/tmp", ignore_cleanup_errors=True) as directory,
        laid.here("far"),
    ):
        hosts = _Hosts(laid, directory)
        try:
            hosts.start_redis()
            hosts.start_head()
            hosts.start_node()
            with _cluster(f"model.path={model_dir}") as cluster, Traffic(cluster.address, answers, 3) as traffic:
                _lose(who, hosts, cluster, traffic)
        finally:
            # Before the directory, into which they write.
            laid.remove()


class _Hosts:
    """Redis and all that serves are on the far one, Ray's head is on the near one."""

    def __init__(self, laid: Cable, directory: str) -> None:
        self._laid, self._directory, self._password = laid, directory, secrets.token_hex(16)
        self.redis: subprocess.Popen[bytes]
        self.head: subprocess.Popen[bytes]

    def start_redis(self) -> None:
        bound = ["--bind", ADDRESSES["far"], "--port", str(_REDIS), "--requirepass", self._password]
        kept = ["--appendonly", "yes", "--save", "", "--dir", self._directory]
        command = [*self._laid.command("far"), "redis-server", *bound, *kept]
        self.redis = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def start_head(self) -> None:
        # A host has its processes to itself: Ray takes for its own what it sees of another head.
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        options = ["--head", f"--port={_RAY}", "--include-dashboard=false", "--num-cpus=0"]
        redis = {"RAY_REDIS_ADDRESS": f"{ADDRESSES['far']}:{_REDIS}"}
        options.append(f"--redis-password={self._password}")
        self.head = self._start_ray([*self._laid.command("near"), *apart], "near", options, redis)

    def start_node(self) -> None:
        options = [f"--address={ADDRESSES['near']}:{_RAY}", "--num-cpus=16"]
        self._start_ray(self._laid.command("far"), "far", options, {})

    def _start_ray(
        self, within: list[str], host: Host, options: list[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        start = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            f"--node-ip-address={ADDRESSES[host]}",
        ]
        sizes = [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={self._directory}/{host}"]
        return subprocess.Popen(
            [*within, *start, *sizes, *options],
            env={**os.environ, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def lose(self, who: str) -> None:
        """Returns when the head is gone."""
        # With the process that is the first of its namespace, all others there end.
        (self.redis if who == "redis" else self.head).kill()
        self.head.wait(_TELL_S)

    def start_again(self, who: str) -> None:
        if who == "redis":
            self.start_redis()
        self.start_head()


def _lose(who: str, hosts: _Hosts, cluster: RunningCluster, traffic: Traffic) -> None:
    with Client(cluster.address, timeout_s=60) as client:
        traffic.flow()
        quiet_s = _gap_s(traffic, _QUIET_S)
        hosts.lose(who)
        gone_s = _gap_s(traffic, _DOWN_S)
        assert client.status().state == "READY", "nobody on this host is missed"

        lost, victim = next(iter(members(client.status(), "decode").items()))
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: lost not in members(client.status(), "decode"), _TELL_S, "its loss is seen without the head")
        loss_s = _gap_s(traffic, _QUIET_S)

        hosts.start_again(who)
        begun_s = time.monotonic()
        wait_until(lambda: settled(client, decode=2), _TELL_S + _START_S, "it is replaced, with the head there again")
        replaced_s = time.monotonic() - begun_s
        client.scale(experts=3)
        traffic.flow()
        assert settled(client, prefill=1, decode=2, experts=3)
        assert client.status().requests_failed == 0
        print(
            f"{who}: longest gap {quiet_s * 1e3:.0f} ms with the head, {gone_s * 1e3:.0f} ms around its loss, "
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


if __name__ == "__main__":
    main(*sys.argv[1:])
