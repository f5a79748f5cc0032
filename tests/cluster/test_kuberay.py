"""The pods of `deploy/kuberay/octet.yaml`, by the commands that KubeRay gives them, each on a host and among processes
of its own. Without GPUs, and with another model."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import pytest
import yaml

from ops.chaos.cable import why_not
from tests.clusters import OBJECT_STORE_BYTES, wait_until
from tests.kuberay import FILE, HEAD, Group, groups

_MISSING = [tool for tool in ("tini", "unshare") if shutil.which(tool) is None]
REASON = why_not() or (f"there is no {_MISSING[0]} here" if _MISSING else "")
pytestmark = [pytest.mark.long, pytest.mark.timeout(400), pytest.mark.skipif(bool(REASON), reason=REASON)]
_BIN = pathlib.Path(sys.executable).parent
_RAY = pathlib.Path("/tmp/ray")
_START_S, _STOP_S, _ANSWER_S = 180.0, 60.0, 60.0


class _Network:
    """Hosts on a bridge, which is in a namespace of its own. Removed at the end, with all that runs on them."""

    def __init__(self) -> None:
        self._prefix = f"octet-pods-{os.getpid()}"
        self._hosts: list[str] = []
        self.bridge = f"{self._prefix}-bridge"

    def build(self) -> None:
        self._add("bridge")
        self._ip("-n", self.bridge, "link", "add", "bridge", "type", "bridge")
        self._ip("-n", self.bridge, "address", "add", "10.78.0.254/24", "dev", "bridge")
        self._ip("-n", self.bridge, "link", "set", "bridge", "up")

    def _add(self, name: str) -> str:
        host = f"{self._prefix}-{name}"
        self._ip("netns", "add", host)
        self._hosts.append(host)
        self._ip("-n", host, "link", "set", "lo", "up")
        return host

    def add(self, name: str) -> tuple[str, str]:
        """Returns: the host, and its address."""
        address, device = f"10.78.0.{len(self._hosts)}", f"port{len(self._hosts)}"
        host = self._add(name)
        self._ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", device, "netns", self.bridge)
        self._ip("-n", self.bridge, "link", "set", device, "master", "bridge", "up")
        self._ip("-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        self._ip("-n", host, "link", "set", "eth0", "up")
        self._ip("-n", host, "route", "add", "default", "via", "10.78.0.254")
        return host, address

    @property
    def command(self) -> list[str]:
        """What a command has to begin with to reach the hosts, and be none of them."""
        return ["ip", "netns", "exec", self.bridge]

    def remove(self) -> None:
        for host in reversed(self._hosts):
            self._ip("netns", "del", host)

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class _Pods:
    def __init__(self, network: _Network, directory: pathlib.Path, changed: Mapping[str, str]) -> None:
        """
        Args:
            directory: for what Ray writes.
            changed: environment variables of the Ray containers.
        """
        self._network, self._directory, self._changed = network, directory, changed
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._places: dict[str, tuple[str, str]] = {}
        self.head_address = ""

    def start(self, name: str, group: Group) -> None:
        """A pod that was there before starts anew, at its address."""
        host, address = self._places.get(name) or self._network.add(name)
        self._places[name] = host, address
        if group.name == HEAD:
            self.head_address = address
        own = self._directory / name
        own.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            **group.environment(self.head_address),
            **self._changed,
            "PATH": _path(),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        apart = ["ip", "netns", "exec", host, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        # Every node's sockets and logs are where the head has its own.
        apart += ["bash", "-ec", f'mount --bind "$0" {_RAY}; exec "$@"', str(own)]
        with (own / "log").open("wb") as log:
            command = [*apart, *group.command(self.head_address)]
            pod = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        self._running[name] = pod

    def address(self, name: str) -> str:
        return self._places[name][1]

    def log(self, name: str) -> str:
        """The last of what it has said."""
        return (self._directory / name / "log").read_text()[-3000:]

    def says(self, name: str, text: str) -> None:
        """Returns when it has."""
        pod = self._running[name]
        wait_until(lambda: pod.poll() is not None or text in self.log(name), _START_S, f"{name} says {text!r}")
        assert pod.poll() is None, f"{name}: {self.log(name)}"

    def end(self, name: str) -> int:
        """As Kubernetes ends one: SIGTERM for its first process. Returns: that one's exit code."""
        pod = self._running[name]
        children = pathlib.Path(f"/proc/{pod.pid}/task/{pod.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGTERM)
        return pod.wait(_STOP_S)

    def kill(self) -> None:
        for pod in self._running.values():
            pod.kill()
            pod.communicate(timeout=_STOP_S)


@contextlib.contextmanager
def _pods(changed: Mapping[str, str]) -> Iterator[tuple[_Network, _Pods]]:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="oct-", dir="/tmp"))
    _RAY.mkdir(exist_ok=True)
    network = _Network()
    pods = _Pods(network, directory, changed)
    try:
        network.build()
        yield network, pods
    finally:
        pods.kill()
        network.remove()
        shutil.rmtree(directory, ignore_errors=True)


def _cpu_config(folder: pathlib.Path) -> pathlib.Path:
    """deploy/cluster.yaml for a small model and no GPUs: of the same pools, with the same resources."""
    config = yaml.safe_load((FILE.parents[1] / "cluster.yaml").read_text())
    for pool in config["pools"].values():
        pool |= {"num_gpus": 0, "threads": 1}
    config["kv"] = {"memory_gib": 0.05}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _without_gpus(group: Group) -> Group:
    """Ray would find none."""
    spec = json.loads(json.dumps(group.spec))
    limits = spec["template"]["spec"]["containers"][0]["resources"]["limits"]
    limits.pop("nvidia.com/gpu", None)
    spec["rayStartParams"]["object-store-memory"] = str(OBJECT_STORE_BYTES)
    return Group(group.name, spec)


def test_the_pods_serve_and_the_one_that_serves_can_be_replaced(
    tmp_path: pathlib.Path, checkpoint: pathlib.Path, answers: Mapping[tuple[int, ...], Sequence[int]]
) -> None:
    changed = {
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "CONFIG": str(_cpu_config(tmp_path)),
        "MODEL": str(checkpoint),
    }
    with _pods(changed) as (network, pods):
        found = {name: _without_gpus(group) for name, group in groups().items()}
        pods.start(HEAD, found[HEAD])
        # A worker's init container waits for it.
        ready = [*network.command, "ray", "health-check", "--address", f"{pods.head_address}:6379"]
        environment = {**os.environ, **changed, "RAY_AUTH_MODE": "token", "PATH": _path()}
        wait_until(
            lambda: (
                subprocess.run(ready, env=environment, capture_output=True, timeout=60, check=False).returncode == 0
            ),
            _START_S,
            "Ray's head is there",
        )
        for name in ("prefill", "decode", "experts"):
            for number in range(found[name].replicas):
                pods.start(f"{name}-{number}", found[name])
        for _ in ("at first", "once more"):
            pods.start("serve", found["serve"])
            pods.says("serve", "octet: ready ")
            prompt, answer = next(iter(answers.items()))
            told = subprocess.run(
                [
                    *(*network.command, str(_BIN / "octet"), "generate"),
                    *(",".join(map(str, prompt)), "--token-ids", "--json", "--ignore-eos"),
                    *("--max-new-tokens", str(len(answer)), "--grpc", f"{pods.address('serve')}:50051"),
                ],
                capture_output=True,
                text=True,
                timeout=_ANSWER_S,
                check=False,
            )
            assert told.returncode == 0, f"{told.stderr}{pods.log('serve')}"
            assert json.loads(told.stdout)["choices"][0]["token_ids"] == list(answer)
            assert pods.end("serve") == 0, pods.log("serve")


def _path() -> str:
    return f"{_BIN}:{os.environ['PATH']}"
