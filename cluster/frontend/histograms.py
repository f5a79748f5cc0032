"""How requests fared since the start, as distributions that can be added up: for whoever watches from outside.

What the autoscaler goes by is `RequestMeter`, which forgets.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

_SECONDS = (
    *(0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 50.0, 100.0, 300.0),
)
_TOKENS = tuple(digits * scale for scale in (1, 10, 100, 1_000, 10_000, 100_000) for digits in (1, 2, 5))


class Histogram:
    """Counts of values by bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """
        Args:
            bounds: ascending; the largest value that belongs to each bucket but the last, which has none.
        """
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def note(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value


class RequestHistograms:
    """Told of every token and of every answer that was finished; seconds are the caller's to take."""

    def __init__(self) -> None:
        self.ttft_s, self.itl_s, self.e2e_s = Histogram(_SECONDS), Histogram(_SECONDS), Histogram(_SECONDS)
        self.prompt_tokens, self.new_tokens = Histogram(_TOKENS), Histogram(_TOKENS)

    def finished(self, e2e_s: float, prompt_tokens: int, new_tokens: int) -> None:
        """
        Args:
            new_tokens: of all choices.
        """
        self.e2e_s.note(e2e_s)
        self.prompt_tokens.note(prompt_tokens)
        self.new_tokens.note(new_tokens)
