"""Whether one more sequence fits until the running ones have ended, and not just now: pure.

Every sequence grows by a token a step, so pages run out some time after an admission, not at it. Who admits by what is
free now evicts soon after, and pays a prefill for a few tokens gained. So the future is played through: sequences grow
side by side and leave as they end, and the newcomer may come if the most pages that are ever held at once exist. It is
the Past-Future scheduler of Gong et al. (ASPLOS 2025): how long answers will get is told by those that have ended.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
from collections.abc import Hashable, Sequence

import numpy as np

_REMEMBERED = 128
_ENOUGH = 4
"""Answers that have to have ended before they say anything about others."""


class AnswerLengths:
    """What share of the tokens that they were allowed recent answers took."""

    def __init__(self) -> None:
        self._shares: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)
        self._ascending: list[float] = []
        self._sums: list[float] = []
        """Of the shares up to each of the ascending ones."""

    def note(self, num_tokens: int, allowed: int) -> None:
        """An answer has ended, by itself or by its client, and will not need pages again."""
        self._shares.append(num_tokens / allowed)
        self._ascending = sorted(self._shares)
        self._sums = [0.0, *itertools.accumulate(self._ascending)]

    def remaining(self, num_tokens: int, allowed: int) -> int:
        """Tokens that an answer of `num_tokens` is expected to get beside them, at least 1.

        The mean of those that got longer than this one is now; where none did, all that it is allowed. Before anything
        is known, half of what is left.
        """
        if len(self._shares) < _ENOUGH:
            expected = (num_tokens + allowed) / 2
        else:
            first = bisect.bisect_right(self._ascending, num_tokens / allowed)
            longer = len(self._ascending) - first
            expected = allowed * (self._sums[-1] - self._sums[first]) / longer if longer else allowed
        return max(1, round(expected) - num_tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a sequence holds, and how long it is expected to go on growing."""

    num_tokens: int
    """With keys and values in pages."""
    remaining: int
    siblings: Hashable
    """Choices of one request share its full pages; this tells whose."""
    shared_pages: int


def peak_pages(demands: Sequence[Demand], page_size: int) -> int:
    """The most pages that are held at once while all of them grow, a token each step, and leave."""
    order = sorted(demands, key=lambda demand: -demand.remaining)
    if not order:
        return 0
    known: set[Hashable] = set()
    shared = []
    for demand in order:
        # The one that stays longest is charged for all, for as long as any of them is there.
        shared.append(demand.shared_pages if demand.siblings in known else 0)
        known.add(demand.siblings)
    tokens_B = np.array([demand.num_tokens for demand in order])
    remaining_B = np.array([demand.remaining for demand in order])
    # Row i is the moment at which sequence i ends; those before it are still there.
    pages_BB = -(-(tokens_B + remaining_B[:, None]) // page_size) - np.array(shared)
    return int(np.tril(pages_BB).sum(axis=1).max())
