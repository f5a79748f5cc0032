"""What a machine runs out of: disk and memory. Needs root."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator

_MEMORY = pathlib.Path("/sys/fs/cgroup/memory")
_BLOCK = 2**16
_LEAVE_S, _POLL_S = 10.0, 0.01


@contextlib.contextmanager
def small_disk(mib: int) -> Iterator[pathlib.Path]:
    """A file system of its own, of that size. Raises: CalledProcessError where this process may not mount."""
    # The paths of Ray's sockets below it have a limit.
    directory = pathlib.Path(tempfile.mkdtemp(prefix="oct-", dir="/tmp"))
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "octet", str(directory)], check=True)
    except BaseException:
        directory.rmdir()
        raise
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


def _dissolve(group: pathlib.Path) -> None:
    """Its processes go back to where they were. One that has just been killed takes its time to leave."""
    deadline_s = time.monotonic() + _LEAVE_S
    while True:
        for left in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, OSError):
                (_MEMORY / "cgroup.procs").write_text(left)
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(_POLL_S)
        else:
            return


def may_limit_memory() -> bool:
    return os.access(_MEMORY / "cgroup.procs", os.W_OK)


def why_no_small_disk() -> str:
    """Why no file system can be mounted here; empty where one can."""
    if os.geteuid() != 0:
        return "mounting a file system takes root"
    try:
        with small_disk(1):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"a file system in memory cannot be mounted: {error}"


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
        _dissolve(group)
