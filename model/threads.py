"""Threads that share the arithmetic of a step, where one call is long enough to be divided.

On a machine that several processes share, one of two cores may be slower, or be taken away in the midst of a call. So
the work is cut finer than there are threads, each takes the next part when it is done with its last one, and one that
has not begun when all parts are taken is not waited for. Which thread computes a part changes no bit of it.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_PART_OPERATIONS = 2**24
"""Worth a turn: 0.07 to 0.2 ms, more than it takes to wake a thread."""

_own: int | None = None


def set_num_threads(count: int, *, own: bool) -> None:
    """Of this process, before anything is computed.

    Args:
        own: its matrices are in panels, whose loops are divided here. Then torch's operators, which are small beside
            them, run on one thread: its threads wait for each other after each operator, however late one gets a core.
    """
    global _own
    _own = count
    torch.set_num_threads(1 if own else count)


def num_threads() -> int:
    """Torch's, unless this process was told another number."""
    return torch.get_num_threads() if _own is None else _own


def in_parts(work: Callable[[int, int], object], count: int, num_operations: int, parts_per_thread: int = 4) -> None:
    """Run `work(first, last)` over `range(count)`, on as many threads as it is worth.

    Args:
        num_operations: multiplications and additions of it all.
        parts_per_thread: at most; fewer where each part costs something of its own.
    """
    threads = num_threads()
    num_parts = min(parts_per_thread * threads, count, num_operations // _PART_OPERATIONS)
    if threads == 1 or num_parts < 2:
        work(0, count)
        return
    take = itertools.count().__next__

    def share() -> None:
        while (part := take()) < num_parts:
            work(part * count // num_parts, (part + 1) * count // num_parts)

    pool = _pool(threads - 1, _niceness())
    others = [pool.submit(share) for _ in range(min(threads, num_parts) - 1)]
    try:
        share()
    finally:
        # Nobody may write to what the caller goes on with; an error of another thread is the caller's.
        for other in others:
            if not other.cancel():
                other.result()


@functools.cache
def _pool(size: int, niceness: int) -> ThreadPoolExecutor:
    """Of threads as nice as the caller, which they inherit: one that has stepped back shares with its like."""
    return ThreadPoolExecutor(size, thread_name_prefix="parts")


def _niceness() -> int:
    """Of the calling thread, where systems have it."""
    return os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else 0
