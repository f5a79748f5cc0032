"""Two hosts on one machine, and the cable between them: network namespaces, joined by a pair of virtual devices.

What is done to the cable is silent: packets vanish, and nobody is told. Nothing of it is to be seen from outside of
the two namespaces, so that addresses are the same each time, and two suites do not meet.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Literal, get_args

from octet.errors import ConfigError

Host = Literal["near", "far"]
HOSTS: tuple[Host, ...] = get_args(Host)
ADDRESSES: dict[Host, str] = {"near": "10.77.0.1", "far": "10.77.0.2"}
_HARDWARE: dict[Host, str] = {"near": "02:00:00:00:77:01", "far": "02:00:00:00:77:02"}
Way = Literal["both", "to far", "from far"]
"""Which packets: those of both hosts, those that the far one should get, or those that it sends."""
_SENDERS: dict[Way, tuple[Host, ...]] = {"both": HOSTS, "to far": ("near",), "from far": ("far",)}

_PREFIX, _DEVICE, _SLOW = "octet-chaos", "cable", "slow"
_NAMESPACES = pathlib.Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_BURST_BYTES, _QUEUE_MS = 16 * 1024, 400
_READY_S, _END_S = 30.0, 5.0


def why_not() -> str:
    """Why there can be no second host here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"there is no {' and no '.join(missing)} here"
    name = f"{_PREFIX}-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", _DEVICE, "type", "veth", "peer", "name", _SLOW)
            _run("tc", "-n", name, "qdisc", "add", "dev", _DEVICE, "root", "blackhole")
        finally:
            _run("ip", "netns", "del", name)
    except ConfigError as error:
        return str(error)
    return ""


class Cable:
    """Made by `cable`. Its methods belong to one thread."""

    def __init__(self, number: int) -> None:
        self._names: dict[Host, str] = {host: f"{_PREFIX}-{number}-{host}" for host in HOSTS}
        self._line: subprocess.Popen[bytes] | None = None

    def command(self, host: Host) -> list[str]:
        """What a command has to begin with to run on that host."""
        return ["ip", "netns", "exec", self._names[host]]

    @contextlib.contextmanager
    def here(self, host: Host) -> Iterator[None]:
        """Let this thread, and all threads and processes that it starts, be on that host."""
        own = pathlib.Path("/proc/thread-self/ns/net")
        with own.open() as before, (_NAMESPACES / self._names[host]).open() as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(before.fileno())

    def processes(self, host: Host) -> list[int]:
        """That are on that host, without this one."""
        found = _run("ip", "netns", "pids", self._names[host]).split()
        return [int(pid) for pid in found if int(pid) != os.getpid()]

    def cut(self, way: Way = "both") -> None:
        """Let packets vanish from now on."""
        for host in _SENDERS[way]:
            self._queue(host, "blackhole")

    def throttle(self, mbit_per_s: float) -> None:
        """Each direction carries no more. What waits for longer than a moment is lost."""
        for host in HOSTS:
            rate = ("tbf", "rate", f"{round(mbit_per_s * 1000)}kbit", "burst", f"{_BURST_BYTES}")
            self._queue(host, *rate, "latency", f"{_QUEUE_MS}ms")

    def delay(self, delay_s: float) -> None:
        """Each direction takes so much longer."""
        self._end_line()
        devices = [f"{_SLOW}-{host}" for host in HOSTS]
        line = [sys.executable, "-m", "ops.chaos.delay_line", *devices, f"{delay_s}"]
        self._line = subprocess.Popen([*self.command("near"), *line], stdout=subprocess.PIPE)
        assert self._line.stdout is not None
        said = select.select([self._line.stdout], [], [], _READY_S)[0]
        if not said or self._line.stdout.readline().strip() != b"ready":
            raise ConfigError("the cable", "no TUN devices", "a kernel with /dev/net/tun")
        _run("ip", "-n", self._names["near"], "link", "set", devices[1], "netns", self._names["far"])
        for host, device in zip(HOSTS, devices, strict=True):
            _run("ip", "-n", self._names[host], "link", "set", device, "up")
        for host, device in zip(HOSTS, devices, strict=True):
            _run("ip", "-n", self._names[host], "route", "add", f"{_peer(host)}/32", "dev", device)

    def mend(self) -> None:
        """As it was. Idempotent."""
        self._end_line()
        for host in HOSTS:
            if "noqueue" not in _run("tc", "-n", self._names[host], "qdisc", "show", "dev", _DEVICE):
                _run("tc", "-n", self._names[host], "qdisc", "del", "dev", _DEVICE, "root")

    def lay(self) -> None:
        """Raises: ConfigError."""
        for host in HOSTS:
            _run("ip", "netns", "add", self._names[host])
            _run("ip", "-n", self._names[host], "link", "set", "lo", "up")
        near, far = self._names["near"], self._names["far"]
        peer = ("peer", "name", _DEVICE, "netns", far)
        _run("ip", "-n", near, "link", "add", _DEVICE, "type", "veth", *peer)
        for host in HOSTS:
            own = ("ip", "-n", self._names[host])
            _run(*own, "address", "add", f"{ADDRESSES[host]}/30", "dev", _DEVICE)
            _run(*own, "link", "set", _DEVICE, "address", _HARDWARE[host], "up")
            # Otherwise hosts would have to find each other again after a cut, for which they take up to a second.
            other: Host = "far" if host == "near" else "near"
            _run(
                *own,
                "neigh",
                "replace",
                ADDRESSES[other],
                "lladdr",
                _HARDWARE[other],
                "dev",
                _DEVICE,
                "nud",
                "permanent",
            )
            # By its route to the world a process finds the address of its own host.
            _run(*own, "route", "add", "default", "via", _peer(host))

    def remove(self) -> None:
        """With every process that is still on one of the hosts, but this one."""
        self._end_line()
        for host in HOSTS:
            if (_NAMESPACES / self._names[host]).exists():
                _kill_all(self.processes(host))
                _run("ip", "netns", "del", self._names[host])

    def _queue(self, host: Host, *discipline: str) -> None:
        _run("tc", "-n", self._names[host], "qdisc", "replace", "dev", _DEVICE, "root", *discipline)

    def _end_line(self) -> None:
        if self._line is not None:
            # Routes over its devices go with them.
            self._line.kill()
            self._line.wait()
            assert self._line.stdout is not None
            self._line.stdout.close()
            self._line = None


@contextlib.contextmanager
def cable() -> Iterator[Cable]:
    """Two hosts as long as the context is open. Raises: ConfigError where there can be none."""
    if reason := why_not():
        raise ConfigError("hosts", 2, "a machine where network namespaces can be made", reason)
    _sweep()
    made = Cable(os.getpid())
    try:
        made.lay()
        yield made
    finally:
        made.remove()


def _sweep() -> None:
    """What processes have left that were killed."""
    found = _NAMESPACES.iterdir() if _NAMESPACES.exists() else ()
    for number in {int(m[1]) for path in found if (m := re.fullmatch(rf"{_PREFIX}-(\d+)-\w+", path.name))}:
        if not pathlib.Path(f"/proc/{number}").exists():
            Cable(number).remove()


def _kill_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _END_S
    while any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline_s:
        for pid in pids:
            # Those that are this process's own.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


def _peer(host: Host) -> str:
    return ADDRESSES["far" if host == "near" else "near"]


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "this process cannot go to another network namespace")


def _run(*command: str) -> str:
    """Raises: ConfigError with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=_READY_S, check=False)
    if done.returncode != 0:
        raise ConfigError("the cable", " ".join(command), "a kernel that can do this", done.stderr.strip())
    return done.stdout
