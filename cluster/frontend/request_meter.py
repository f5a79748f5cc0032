"""What a frontend tells the autoscaler: prompt tokens that came, and how its answers kept their targets."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from cluster.frontend.slo import Slo

_PERCENTILE = 95
_MOST_KEPT = 4096
"""Samples of each kind; of more within a period, the last."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """One look-back period of requests."""

    period_s: float
    arriving_prompt_tokens_per_s: float
    """To be computed, as far as the frontend knows what prefix caches hold."""
    queued_prompt_tokens: float
    """Sent to prefill workers and not answered."""
    waiting: int
    """Requests without a token yet, or without a place in a decode worker."""
    first_ratio: float | None
    """95th percentile of times to the first token ÷ what is allowed; None without any, as is the next."""
    answer_ratio: float | None


class RequestMeter:
    """Events in, loads out; the clock is the caller's. Belongs to the frontend's event loop."""

    def __init__(self, slo: Slo, look_back_period_s: float) -> None:
        self._slo, self._period_s = slo, look_back_period_s
        self._arrived: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST_KEPT)
        self._first: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST_KEPT)
        self._answers: collections.deque[tuple[float, float]] = collections.deque(maxlen=_MOST_KEPT)

    def arrived(self, now_s: float, prompt_tokens: int, cached_tokens: int) -> None:
        """A request was sent to a prefill worker that probably has so many of its tokens."""
        self._arrived.append((now_s, float(prompt_tokens - cached_tokens)))

    def first_token(self, now_s: float, ttft_s: float, prompt_tokens: int) -> None:
        self._first.append((now_s, self._slo.first_ratio(ttft_s, prompt_tokens)))

    def finished(self, now_s: float, after_s: float, new_tokens: int) -> None:
        """
        Args:
            after_s: from the first token to the last.
        """
        if new_tokens > 1:
            self._answers.append((now_s, self._slo.answer_ratio(after_s, new_tokens)))

    def load(self, now_s: float, queued_prompt_tokens: float, waiting: int) -> RequestLoad:
        for samples in (self._arrived, self._first, self._answers):
            while samples and samples[0][0] <= now_s - self._period_s:
                samples.popleft()
        # Where more came than is kept, the time that is known is shorter.
        full = len(self._arrived) == _MOST_KEPT
        known_s = max(now_s - self._arrived[0][0], 1e-3) if full else self._period_s
        return RequestLoad(
            period_s=self._period_s,
            arriving_prompt_tokens_per_s=sum(tokens for _, tokens in self._arrived) / known_s,
            queued_prompt_tokens=queued_prompt_tokens,
            waiting=waiting,
            first_ratio=_percentile(self._first),
            answer_ratio=_percentile(self._answers),
        )


def _percentile(samples: collections.deque[tuple[float, float]]) -> float | None:
    return float(np.percentile([value for _, value in samples], _PERCENTILE)) if samples else None
