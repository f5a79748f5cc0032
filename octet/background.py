"""Threads that leave the cores to others on the same machine."""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import threading

_log = logging.getLogger(__name__)


COMPUTING = 8
"""Of threads that compute, beyond those that answer: where they share cores, calls are answered in between."""


MEMBERS = 2
"""Of the processes of members, beyond that of who starts them."""

_MOST = 19
_STEP = 1.25
"""What a step of niceness is worth, as a factor of a thread's weight (`sched_prio_to_weight` of Linux)."""


def share_behind(niceness: int) -> float:
    """What a thread of a member that computes gets of a busy core when it steps back, beside one that does not: 1 is as
    much.

    Args:
        niceness: by which it steps back.
    """
    share: float = _STEP ** -min(niceness, _MOST - COMPUTING - MEMBERS)
    return share


def step_back(niceness: int) -> None:
    """Give the calling thread, and those that it starts, a smaller share of a busy core.

    Args:
        niceness: beyond what the thread has; each step is worth about a fifth of its share.
    """
    thread = threading.get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, thread, min(os.getpriority(os.PRIO_PROCESS, thread) + niceness, _MOST))
    except (AttributeError, OSError) as error:
        _log.debug("this system schedules all threads alike: %s", error)


def wake_behind() -> None:
    """Let the calling thread, when it wakes, take a core that is free or wait for its turn on a busy one (Linux's
    SCHED_BATCH, which takes no privilege): it does not displace whoever woke it and has something to do first."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError) as error:
        _log.debug("this system schedules all threads alike: %s", error)


def give_way() -> None:
    """Let all threads of this process, and those that they start, have only what no other process of its session wants
    of the cores (Linux's SCHED_IDLE, which takes no privilege, and from which there is no way back without one).

    For a process that has nothing left to do but end, where others serve: to take its memory apart takes some 20 ms of
    a core, in whichever of its threads is the last.
    """
    try:
        for task in pathlib.Path("/proc/self/task").iterdir():
            # It may have ended meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(task.name), os.SCHED_IDLE, os.sched_param(0))
    except (AttributeError, OSError) as error:
        _log.debug("this system schedules all threads alike: %s", error)
