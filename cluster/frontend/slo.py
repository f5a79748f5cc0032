"""What a request is promised."""

from __future__ import annotations

import dataclasses

HANDOFF_S = 1.0
"""Of an answer's time, for its KV pages to move: all of it for an answer of two tokens, nothing much for one of 300."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The first token in time for the prompt's length, and the others at a pace."""

    ttft_s: float
    ttft_per_1k_tokens_s: float
    tpot_s: float

    def first_ratio(self, ttft_s: float, prompt_tokens: int) -> float:
        """The time to the first token ÷ what is allowed."""
        return ttft_s / (self.ttft_s + self.ttft_per_1k_tokens_s * prompt_tokens / 1000)

    def answer_ratio(self, after_s: float, new_tokens: int) -> float:
        """The time from the first token to the last ÷ what is allowed."""
        return after_s / (self.tpot_s * (new_tokens - 1) + HANDOFF_S)

    def keeps(self, ttft_s: float, tpot_s: float, prompt_tokens: int, new_tokens: int) -> bool:
        """Whether a request kept both."""
        return (
            self.first_ratio(ttft_s, prompt_tokens) <= 1
            and self.answer_ratio(tpot_s * (new_tokens - 1), new_tokens) <= 1
        )
