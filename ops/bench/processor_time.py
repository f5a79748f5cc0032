"""Processor time so far, as Linux counts it. On other systems there is none."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterable

PROC = pathlib.Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def machine_s(proc: pathlib.Path = PROC) -> float:
    """Seconds of all cores in which anybody had them, other machines on the same processor included.

    Raises: OSError where the system does not tell.
    """
    user, nice, system, _idle, _waiting, *rest = map(int, (proc / "stat").read_text().partition("\n")[0].split()[1:9])
    return (user + nice + system + sum(rest)) / _TICKS_PER_S


def process_s(process: pathlib.Path, *, ended_children: bool = False) -> float:
    """Of one process, by its folder.

    Args:
        ended_children: whether those that it has waited for count as well.

    Raises: OSError if it has ended, or the system does not tell.
    """
    used = stat_fields(process)[11 : 15 if ended_children else 13]
    return sum(map(int, used)) / _TICKS_PER_S


def stat_fields(process: pathlib.Path) -> list[str]:
    """What stands behind the name of a process, which may have anything in it. Raises: as `process_s`."""
    return (process / "stat").read_text(errors="replace").rpartition(")")[2].split()


def threads_s(pids: Iterable[int]) -> float:
    """Of those threads of these processes which are there now: counted in nanoseconds."""
    total_ns = 0
    for pid in pids:
        for task in (PROC / str(pid) / "task").glob("*"):
            with contextlib.suppress(OSError):
                total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9
