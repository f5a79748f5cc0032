"""Facts about the processes that members run in."""

from __future__ import annotations

import os
import pathlib


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def is_idle(pid: int) -> bool:
    """Whether every thread of a process on this machine sleeps: none runs, waits for a processor or for a disk."""
    try:
        states = [
            stat.read_text().rpartition(")")[2].split()[0] for stat in pathlib.Path(f"/proc/{pid}/task").glob("*/stat")
        ]
    except OSError:
        # A thread, or all of it, has just ended.
        return False
    return bool(states) and all(state == "S" for state in states)
