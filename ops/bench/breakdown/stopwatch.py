"""Where the time of one thread goes, part by part, so that the parts add up to the whole."""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar

REST = "rest"
"""The part of what no probe claims."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    start_s: float
    stop_s: float
    parts: dict[str, float]
    """Seconds by part. Their sum is `total_s`."""
    running: dict[str, float]
    """Seconds of them in which the thread had a core. Where it does not wait, the rest went to other processes."""

    @property
    def total_s(self) -> float:
        return self.stop_s - self.start_s


class Stopwatch:
    """Charges every moment to the innermost part that is open. Belongs to the thread that calls `lap`.

    Functions that it has wrapped are called as they are by other threads, and before the first lap.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.thread_time
    ) -> None:
        self._clock, self._cpu_clock = clock, cpu_clock
        self._owner: int | None = None
        self._open = [REST]
        self._parts: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._start_s = self._since_s = self._cpu_since_s = 0.0

    def wrap(self, function: Callable[_P, _R], part: str) -> Callable[_P, _R]:
        """The function, with the time it takes charged to `part`, less what it calls that has a part of its own."""

        @functools.wraps(function)
        def timed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            if threading.get_ident() != self._owner:
                return function(*args, **kwargs)
            self._charge()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return timed

    def divide(self, part: str, shares: Iterable[tuple[str, float]]) -> None:
        """Charge seconds of what was charged to `part` in this lap to other parts. By the thread that calls `lap`."""
        if threading.get_ident() != self._owner:
            return
        for other, seconds in shares:
            for charged in (self._parts, self._running):
                charged[other] = charged.get(other, 0.0) + seconds
                charged[part] = charged.get(part, 0.0) - seconds

    def lap(self) -> Lap | None:
        """End a lap and begin the next one. Returns: the lap that ended; None at the first call."""
        first = self._owner is None
        if first:
            self._owner = threading.get_ident()
            self._start_s = self._since_s = self._clock()
            self._cpu_since_s = self._cpu_clock()
            return None
        self._charge()
        ended = Lap(start_s=self._start_s, stop_s=self._since_s, parts=self._parts, running=self._running)
        self._start_s, self._parts, self._running = self._since_s, {}, {}
        return ended

    def _charge(self) -> None:
        now_s, cpu_now_s, part = self._clock(), self._cpu_clock(), self._open[-1]
        self._parts[part] = self._parts.get(part, 0.0) + (now_s - self._since_s)
        self._running[part] = self._running.get(part, 0.0) + (cpu_now_s - self._cpu_since_s)
        self._since_s, self._cpu_since_s = now_s, cpu_now_s
