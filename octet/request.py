"""What one generation asks for, as plain values shared by every pool."""

from __future__ import annotations

import dataclasses
from typing import Literal

from octet.interval import Interval

FinishReason = Literal["stop", "length", "aborted"]

SAMPLING_RANGES = {
    "temperature": Interval(0, 100),
    "top_p": Interval(0, 1, above_low=True),
    "min_p": Interval(0, 1),
    # Below, logits that it multiplies or divides might not be finite any more.
    "repetition_penalty": Interval(0.01, 100),
    "presence_penalty": Interval(-2, 2),
    "frequency_penalty": Interval(-2, 2),
}
"""What fields of `Sampling` a request may ask for, and a checkpoint's defaults."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen from the logits of its position.

    The token at position p of choice c is a function of the logits and (seed, c, p) alone.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a choice ends by its token ids. Stop strings are matched at the frontend, where the text is."""

    max_new_tokens: int
    min_new_tokens: int = 0
    """So many tokens come before one that stops, as in vLLM and `transformers`."""
    stop_token_ids: tuple[int, ...] = ()
    """The model's end-of-sequence ids are among these unless the request ignores them."""

    def finish_reason(self, token_id: int, num_new_tokens: int) -> FinishReason | None:
        """Why the choice ends with `token_id` as its `num_new_tokens`-th token, or None."""
        if token_id in self.stop_token_ids and num_new_tokens > self.min_new_tokens:
            return "stop"
        if num_new_tokens >= self.max_new_tokens:
            return "length"
        return None

    def masked_ids(self, num_new_tokens: int) -> tuple[int, ...]:
        """Ids that may not be sampled after `num_new_tokens` tokens, since the minimum is not reached."""
        return self.stop_token_ids if num_new_tokens < self.min_new_tokens else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What is reported beside the tokens."""

    logprobs: int | None = None
    """Number of alternatives per token; None for no log-probabilities at all."""
    prompt_logprobs: bool = False
