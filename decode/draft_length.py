"""How many tokens to draft in a step: pure, from what was accepted and what steps took."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque

_SAMPLES = 8
"""Step times kept for each length; their median counts (of two the lower), so that a step that was held up does not."""
_FIRST_SAMPLES = 2
_PROBE_EVERY = 32
_DECAY_DRAFTING, _DECAY_IDLE = 0.97, 0.995
"""Of what is known of acceptance, per step: it goes stale, more slowly while nothing is learnt."""
_GAIN = 1.03
"""A change has to promise this much, or noise would go back and forth."""


class DraftLength:
    """Chooses the length that promises the most tokens per second, which may be none.

    A draft is accepted with probability `a` if all before it were, so a step with `k` drafts brings
    `1 + a + … + aᵏ` tokens per sequence (Leviathan et al., Fast Inference from Transformers via Speculative Decoding,
    2023, eq. 1). What it costs is measured, apart for batches of about the same size: `[1], [2, 3], [4 … 7] …`.
    Lengths never tried are tried first, and now and then a neighbour of the best one.
    """

    def __init__(self, most: int) -> None:
        """
        Args:
            most: tokens that may be drafted for a sequence in one step.
        """
        self._most = most
        # As if two drafts had been verified before, one of them right.
        self._accepted = self._tested = 0.0
        self._times: dict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_SAMPLES))
        self._best: dict[int, int] = defaultdict(lambda: most)
        self._steps: dict[int, int] = defaultdict(int)

    @property
    def acceptance(self) -> float:
        """The probability that a draft is right, all before it being so."""
        return (self._accepted + 1) / (self._tested + 2)

    def choose(self, num_sequences: int) -> int:
        """The length for the next step."""
        size = num_sequences.bit_length()
        for length in range(self._most, -1, -1):
            if len(self._times[size, length]) < _FIRST_SAMPLES:
                return length
        self._best[size] = best = self._better(size)
        number, probing = divmod(self._steps[size], _PROBE_EVERY)
        if probing != _PROBE_EVERY - 1:
            return best
        # Upwards and downwards in turn; at either end there is only one neighbour.
        neighbour = best + (1 if number % 2 == 0 else -1)
        return neighbour if 0 <= neighbour <= self._most else 2 * best - neighbour

    def observe(self, num_sequences: int, length: int, *, tested: int, accepted: int, step_s: float) -> None:
        """Take account of a step.

        Args:
            tested: drafts that were compared, over all sequences: the accepted ones, and the first wrong one of each.
        """
        size = num_sequences.bit_length()
        decay = _DECAY_DRAFTING if tested else _DECAY_IDLE
        self._accepted = self._accepted * decay + accepted
        self._tested = self._tested * decay + tested
        self._times[size, length].append(step_s)
        self._steps[size] += 1

    def _better(self, size: int) -> int:
        """The best length of a batch size, or the present one if none is clearly better."""
        present = self._best[size]
        rates = [self._tokens(k) / statistics.median_low(self._times[size, k]) for k in range(self._most + 1)]
        best = max(range(self._most + 1), key=rates.__getitem__)
        return best if rates[best] > _GAIN * rates[present] else present

    def _tokens(self, length: int) -> float:
        return sum(self.acceptance**k for k in range(length + 1))
