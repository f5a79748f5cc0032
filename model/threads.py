"""Threads that share the arithmetic of a step, where one call is long enough to be divided.

On a machine that several processes share, one of two cores may be slower, or be taken away in the midst of a call. So
the work is cut finer than there are threads, each takes the next part when it is done with its last one, and one that
has not begun when all parts are taken is not waited for. Which thread computes a part changes no bit of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_PART_OPERATIONS = 2**24
"""Worth a turn: 0.07 to 0.2 ms, more than it takes to wake a thread, or to begin a part."""

_PER_BYTE = 16
"""Operations that a byte counts as which is copied or added."""
_SHARE = 2
"""A part is an even share of what is left, divided by this."""

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


def in_parts(
    work: Callable[[int, int], object], count: int, num_operations: int, parts_per_thread: int | None = None
) -> None:
    """Run `work(first, last)` over `range(count)`, on as many threads as it is worth.

    Args:
        num_operations: multiplications and additions of it all.
        parts_per_thread: at most, all alike, where each part costs something of its own. Otherwise they shrink.
    """
    threads = num_threads()
    num_parts = min(count, num_operations // _PART_OPERATIONS)
    if threads == 1 or num_parts < 2:
        work(0, count)
        return
    if parts_per_thread is None:
        bounds = _shrinking(count, -(-count // num_parts), threads)
    else:
        num_parts = min(num_parts, parts_per_thread * threads)
        bounds = tuple(part * count // num_parts for part in range(num_parts + 1))
    parts = itertools.pairwise(bounds)

    def share() -> None:
        # Of one iterator: whoever asks first takes the next part.
        for first, last in parts:
            work(first, last)

    pool, apart = _pool(threads - 1, _niceness())
    apart.from_caller()
    others = [pool.submit(share) for _ in range(min(threads, len(bounds) - 1) - 1)]
    try:
        share()
    finally:
        # Nobody may write to what the caller goes on with.
        begun = [other for other in others if not other.cancel()]
        errors = [error for other in begun if (error := other.exception()) is not None]
    for error in errors:
        # Of another thread, it is the caller's.
        raise error


@functools.lru_cache(maxsize=256)
def _shrinking(count: int, least: int, threads: int) -> tuple[int, ...]:
    """Bounds of parts, each a share of what is left: long ones while there is much to do, and short ones in the end,
    when the others wait for the last (Polychronopoulos and Kuck, Guided self-scheduling, 1987)."""
    bounds = [0]
    while (left := count - bounds[-1]) > 0:
        bounds.append(bounds[-1] + min(left, max(left // (_SHARE * threads), least)))
    return tuple(bounds)


def moving(num_bytes: int) -> int:
    """What copying so much, or adding it to something, counts as for `in_parts`: a mebibyte is worth a turn."""
    return _PER_BYTE * num_bytes


class Apart:
    """Threads that are kept off the core of whoever calls them.

    A thread that is woken for a fraction of a millisecond is often put where its waker runs, and two that share a step
    then take turns on one core while another is idle. The system's balancing is slower than that.
    """

    def __init__(self) -> None:
        self._threads: list[int] = []
        self._core = -1

    def add(self) -> None:
        """The calling thread."""
        self._threads.append(threading.get_native_id())
        self._core = -1

    def from_caller(self) -> None:
        """Of the cores that the calling thread may have, they get all but the one that it is on. Cheap if that is the
        same as the last time; nothing happens where there is one core only, or the system does not tell."""
        core = _core()
        if core == self._core:
            return
        self._core = core
        others = os.sched_getaffinity(0) - {core} if core >= 0 else set()
        if others:
            for thread in self._threads:
                # It is no error to have ended.
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread, others)


@functools.cache
def _find_core() -> Callable[[], int]:
    try:
        # Holding the interpreter's lock: it takes less than letting it go.
        find: Callable[[], int] = ctypes.PyDLL(None).sched_getcpu
    except (OSError, AttributeError):
        return lambda: -1
    return find


def _core() -> int:
    """That the calling thread is on; -1 where the system does not tell."""
    return _find_core()()


@functools.cache
def _pool(size: int, niceness: int) -> tuple[ThreadPoolExecutor, Apart]:
    """Of threads as nice as the caller, which they inherit: one that has stepped back shares with its like."""
    apart = Apart()
    return ThreadPoolExecutor(size, thread_name_prefix="parts", initializer=apart.add), apart


def _niceness() -> int:
    """Of the calling thread, where systems have it."""
    return os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else 0
