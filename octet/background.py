"""Threads that leave the cores to others on the same machine."""

from __future__ import annotations

import logging
import os

_log = logging.getLogger(__name__)


def wake_behind() -> None:
    """Let the calling thread, when it wakes, take a core that is free or wait for its turn on a busy one (Linux's
    SCHED_BATCH, which takes no privilege): it does not displace whoever woke it and has something to do first."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except (AttributeError, OSError) as error:
        _log.debug("this system schedules all threads alike: %s", error)
