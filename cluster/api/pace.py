"""How often a stream is told what is new, where the frontend's one thread cannot serve all of them by the token.

A chunk costs that thread a fifth of a millisecond, however many tokens are in it. Where chunks wait for their turn, so
do calls that should be refused at once, and reports of the workers. So streams rest after a chunk, and the next one has
what came meanwhile. Rests grow by steps and shrink by a factor.
"""

from __future__ import annotations

FEW_STREAMS = 32
"""So many are never paced: what they wait for is not the frontend."""
LONGEST_S = 0.25
"""Of a rest."""
_MOST_BUSY, _LEAST_BUSY = 0.4, 0.28
"""Shares of its time for which the thread computes, from which on rests grow, and below which they shrink: a call is
accepted in some six turns of the event loop, which are short only where the thread has time to spare."""
_LATE_S, _EARLY_S = 0.010, 0.004
"""Likewise, what a write may take, where others have the cores. It waits for one turn of the event loop."""
_STEP_S, _SHRINK = 0.010, 0.8
_PERIOD_S = 0.05
"""After which a decision is made."""


class Pace:
    """Of all streams of a frontend. Belongs to its event loop."""

    def __init__(self) -> None:
        self.rest_s = 0.0
        """For how long a stream rests after a chunk."""
        self._least_s = float("inf")
        self._began_s, self._had_s = 0.0, 0.0

    def note(self, took_s: float, num_streams: int, now_s: float, computed_s: float) -> None:
        """A chunk was written. Of some that were, the fastest counts: clients that do not read make theirs slow.

        Args:
            now_s: of a clock that goes on while the thread waits.
            computed_s: of one that does not.
        """
        self._least_s = min(self._least_s, took_s)
        passed_s = now_s - self._began_s
        if num_streams <= FEW_STREAMS:
            self.rest_s = 0.0
        elif passed_s < _PERIOD_S:
            return
        else:
            busy, least_s = (computed_s - self._had_s) / passed_s, self._least_s
            if busy > _MOST_BUSY or least_s > _LATE_S:
                self.rest_s = min(self.rest_s + _STEP_S, LONGEST_S)
            elif busy < _LEAST_BUSY and least_s < _EARLY_S:
                self.rest_s = self.rest_s * _SHRINK if self.rest_s > _STEP_S else 0.0
        self._least_s, self._began_s, self._had_s = float("inf"), now_s, computed_s
