"""Simulated time, and what is to happen at which moment of it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any


class Clock:
    """What is due at the same moment happens in the order in which it was set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def after(self, delay_s: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._order), what, args))

    def every(self, period_s: float, what: Callable[[], None]) -> None:
        """From one period on."""

        def again() -> None:
            what()
            self.after(period_s, again)

        self.after(period_s, again)

    @property
    def next_s(self) -> float:
        return self._events[0][0] if self._events else float("inf")

    def advance(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)

    def happen(self) -> None:
        """Go to the next event, and let it happen."""
        at_s, _, what, args = heapq.heappop(self._events)
        self.advance(at_s)
        what(*args)
