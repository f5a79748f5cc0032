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
_LATE_S, _EARLY_S = 0.010, 0.004
"""What a write may take before rests grow, and until they shrink. It waits for one turn of the event loop."""
_STEP_S, _SHRINK = 0.010, 0.8
_WRITES = 32
"""By which one decision is made."""


class Pace:
    """Of all streams of a frontend. Belongs to its event loop."""

    def __init__(self) -> None:
        self.rest_s = 0.0
        """For how long a stream rests after a chunk."""
        self._least_s, self._num_writes = float("inf"), 0

    def note(self, took_s: float, num_streams: int) -> None:
        """A chunk was written. Of some that were, the fastest counts: clients that do not read make theirs slow."""
        self._least_s, self._num_writes = min(self._least_s, took_s), self._num_writes + 1
        if self._num_writes < _WRITES and num_streams > FEW_STREAMS:
            return
        least_s = self._least_s
        self._least_s, self._num_writes = float("inf"), 0
        if num_streams <= FEW_STREAMS:
            self.rest_s = 0.0
        elif least_s > _LATE_S:
            self.rest_s = min(self.rest_s + _STEP_S, LONGEST_S)
        elif least_s < _EARLY_S:
            self.rest_s = self.rest_s * _SHRINK if self.rest_s > _STEP_S else 0.0
