"""What a machine runs out of, or gets wrong: disk, memory, and the time of day. Needs root, or libfaketime."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator

_MEMORY = pathlib.Path("/sys/fs/cgroup/memory")
_FAKETIME = (
    "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1",
    "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1",
)
_SLEEP = """
#include <errno.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    return syscall(SYS_clock_nanosleep, clock, flags, until, left) ? errno : 0;
}
"""
"""libfaketime 0.9.10 fails every sleep by a clock that it does not fake, and Python sleeps by such a one."""
_BLOCK = 2**16


@contextlib.contextmanager
def small_disk(mib: int) -> Iterator[pathlib.Path]:
    """A file system of its own, of that size. Raises: CalledProcessError where this process may not mount."""
    # The paths of Ray's sockets below it have a limit.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="oct-", dir="/tmp"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "octet", str(directory)], check=True)
    try:
        yield directory
    finally:
        # Whoever still has a file open there keeps it, and nobody else sees it any more.
        subprocess.run(["umount", "--lazy", str(directory)], check=False)
        directory.rmdir()


@contextlib.contextmanager
def filled(directory: pathlib.Path) -> Iterator[None]:
    """Not a byte is free on its file system, as long as the context is open."""
    ballast = directory / "ballast"
    file = os.open(ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        size = _BLOCK
        while size:
            try:
                os.write(file, bytes(size))
            except OSError:
                size //= 2
        yield
    finally:
        os.close(file)
        ballast.unlink()


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A control group (version 1)."""

    directory: pathlib.Path

    @property
    def num_killed(self) -> int:
        """By the kernel, for being over the limit."""
        lines = (self.directory / "memory.oom_control").read_text().splitlines()
        return int(dict(line.split() for line in lines).get("oom_kill", 0))


def may_limit_memory() -> bool:
    return os.access(_MEMORY / "cgroup.procs", os.W_OK)


@contextlib.contextmanager
def memory_limit(pid: int, kib: int) -> Iterator[MemoryLimit]:
    """A process may take this much more than it has. Beyond that the kernel kills it."""
    group = _MEMORY / f"octet-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(kib * 2**10))
        # What it has already stays where it was counted.
        (group / "cgroup.procs").write_text(str(pid))
        yield MemoryLimit(group)
    finally:
        for left in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, OSError):
                (_MEMORY / "cgroup.procs").write_text(left)
        group.rmdir()


class WallClock:
    """The time of day of the processes that are started with `env`; their other clocks go on as they are."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._file = directory / "faketime"
        self._sleep = directory / "sleep.so"
        source = self._sleep.with_suffix(".c")
        source.write_text(_SLEEP)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(self._sleep), str(source)], check=True, timeout=60)
        self.jump(0)

    def jump(self, seconds: float) -> None:
        """So far from the right time, from now on."""
        next_file = self._file.with_suffix(".next")
        next_file.write_text(f"{seconds:+f}\n")
        next_file.replace(self._file)

    @property
    def env(self) -> dict[str, str]:
        library = faketime_library()
        assert library is not None
        return {
            "LD_PRELOAD": f"{self._sleep}:{library}",
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


def faketime_library() -> str | None:
    """Where libfaketime is, if it is installed, and a compiler for what it lacks."""
    if shutil.which("cc") is None:
        return None
    return next((path for path in _FAKETIME if pathlib.Path(path).exists()), None)
