"""Whether a prompt that comes to an idle worker is worth a wait for others: pure.

A chunk of one prompt is computed at half the rate of a chunk of many, so the first of a burst had better wait for the
rest of it; a prompt that comes alone would wait for nobody. Which of the two it is shows too late. So the next is taken
for what the last one was: bursts come where bursts came.
"""

from __future__ import annotations

import math


class Bursts:
    """Told of every prompt that comes, in whatever order."""

    def __init__(self, apart_s: float) -> None:
        """
        Args:
            apart_s: between prompts of the same burst, at most.
        """
        self._apart_s, self._last_s = apart_s, -math.inf
        self._size, self._were_together = 0, True

    def note(self, arrival_s: float) -> None:
        """A prompt has come that arrived then, on whatever clock."""
        if self._size and arrival_s - self._last_s > self._apart_s:
            self._size, self._were_together = 0, self._size > 1
        self._size, self._last_s = self._size + 1, arrival_s

    @property
    def expected(self) -> bool:
        """Whether the last prompt belongs to a burst by what has come so far, or the ones before it did."""
        return self._size > 1 or self._were_together
