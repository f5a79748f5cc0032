"""How long a thread keeps a core that another one wants: what the scheduler of this machine gives in turn."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

_SPIN_S = 0.5
_START_S = 60.0
_DISPLACED_S = 2e-4
"""More than anything but another thread takes from one that spins."""


def turn_s() -> float:
    """Of two processes that want the same core and nothing else; 0 if they did not take turns there."""
    core = min(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    both = context.Barrier(2)
    with ProcessPoolExecutor(2, context, initializer=both.wait, initargs=(_START_S,)) as processes:
        spinning = [processes.submit(_turns, core, _SPIN_S) for _ in range(2)]
        turns = [one.result(_START_S + _SPIN_S) for one in spinning]
    found = list(itertools.chain(*turns))
    return statistics.median(found) if found else 0.0


def _turns(core: int, spin_s: float) -> list[float]:
    """Seconds from each time it got the core to when it lost it."""
    os.sched_setaffinity(0, {core})
    begun_s = last_s = time.perf_counter()
    turns, since_s = [], None
    while last_s - begun_s < spin_s:
        now_s = time.perf_counter()
        if now_s - last_s > _DISPLACED_S:
            if since_s is not None:
                turns.append(last_s - since_s)
            since_s = now_s
        last_s = now_s
    return turns
