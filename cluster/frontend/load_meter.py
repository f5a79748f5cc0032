"""What a frontend has in hand, and how fast it gets done: what admission decides by."""

from __future__ import annotations

import math

from cluster.frontend.admission import Backlog, Demand, Rates

_WINDOW_S = 10.0
"""Busy seconds after which what was measured counts a third."""
_ENOUGH_S = 1.0
"""Busy seconds after which a rate is one."""
_ANSWER_WEIGHT = 0.05
"""Of the latest answer in the expected length of answers."""
_TOKEN_WEIGHT = 0.01
"""Of the latest token in the time from one to the next."""


class Rate:
    """Work per second, over the seconds in which there was any. Clocks are passed in."""

    def __init__(self) -> None:
        self._work = self._busy_s = 0.0
        self._last_s: float | None = None

    def note(self, now_s: float, work: float, busy: bool) -> None:
        """
        Args:
            work: that was done since the last call.
            busy: whether there is more to do from now on.
        """
        if self._last_s is not None:
            elapsed_s = now_s - self._last_s
            kept = math.exp(-elapsed_s / _WINDOW_S)
            self._work, self._busy_s = self._work * kept + work, self._busy_s * kept + elapsed_s
        self._last_s = now_s if busy else None

    @property
    def per_s(self) -> float | None:
        return self._work / self._busy_s if self._busy_s >= _ENOUGH_S else None


class LoadMeter:
    """Told of every accepted request's way: `accept`, `prefilled` with its first token, `generated`, `end`."""

    def __init__(self) -> None:
        self._requests = 0
        self._waiting_tokens = {-1: 0, 0: 0, 1: 0}
        self._decoding = 0
        self._new_tokens = 0
        self._answer_share = 1.0
        self._tpot_s: float | None = None
        self._prefill, self._decode = Rate(), Rate()

    def accept(self, demand: Demand, now_s: float) -> None:
        self._requests += 1
        self._waiting_tokens[_sign(demand.priority)] += demand.prompt_tokens
        self._new_tokens += demand.new_tokens
        self._note(now_s)

    def prefilled(self, demand: Demand, now_s: float) -> None:
        self._waiting_tokens[_sign(demand.priority)] -= demand.prompt_tokens
        self._decoding += 1
        self._note(now_s, prompt_tokens=demand.prompt_tokens)

    def generated(self, now_s: float, since_last_s: float | None) -> None:
        """One token, so long after the one before it in its answer, if there was one."""
        if since_last_s is not None:
            before_s = since_last_s if self._tpot_s is None else self._tpot_s
            self._tpot_s = before_s + _TOKEN_WEIGHT * (since_last_s - before_s)
        self._new_tokens -= 1
        self._note(now_s, new_tokens=1)

    def end(self, demand: Demand, num_generated: int, *, prefilled: bool, finished: bool, now_s: float) -> None:
        self._requests -= 1
        self._new_tokens -= demand.new_tokens - num_generated
        if prefilled:
            self._decoding -= 1
        else:
            self._waiting_tokens[_sign(demand.priority)] -= demand.prompt_tokens
        if finished and demand.new_tokens:
            self._answer_share += _ANSWER_WEIGHT * (num_generated / demand.new_tokens - self._answer_share)
        self._note(now_s)

    def backlog(self, priority: int, free_places: int = 0) -> Backlog:
        """As a request of this priority finds it, for which there are so many places in batches."""
        ahead = sum(tokens for sign, tokens in self._waiting_tokens.items() if sign <= _sign(priority))
        return Backlog(
            requests=self._requests,
            prompt_tokens=sum(self._waiting_tokens.values()),
            prompt_tokens_ahead=ahead,
            new_tokens=self._new_tokens * self._answer_share,
            answer_share=self._answer_share,
            free_places=free_places,
        )

    @property
    def rates(self) -> Rates:
        return Rates(prefill_tokens_s=self._prefill.per_s, decode_tokens_s=self._decode.per_s, tpot_s=self._tpot_s)

    def _note(self, now_s: float, *, prompt_tokens: int = 0, new_tokens: int = 0) -> None:
        self._prefill.note(now_s, prompt_tokens, any(self._waiting_tokens.values()))
        self._decode.note(now_s, new_tokens, self._decoding > 0)


def _sign(priority: int) -> int:
    return (priority > 0) - (priority < 0)
