"""Choosing tokens: a function of the logits and of (seed, choice, position), for every row of a batch on its own.

Both prefill (the first token) and decode sample, hence it lives below both. Processors are applied in the order of
`transformers`: penalties, minimum length, temperature, top-k, top-p, min-p.

Shapes: `B` rows, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import threading
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch

from octet.messages import TokenLogprob
from octet.request import Output, Sampling, Stopping

NO_TOKEN = -1
NO_TOKEN_REASON = (
    "the logits of its next token are no finite numbers: the model's numbers overflow, or its weights are damaged"
)
LEAST_TEMPERATURE = 1e-30
"""Below it, which is as good as greedy, logits divided by the temperature would not be numbers any more."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SampleRow:
    """One row of logits: the next token of one choice."""

    sampling: Sampling
    stopping: Stopping
    output: Output
    choice: int
    token_ids: Sequence[int]
    """The prompt, then the tokens generated so far."""
    num_prompt_tokens: int
    drafted: Sequence[int] = ()
    """Tokens that come after them, if they stand."""

    @property
    def position(self) -> int:
        """Of the token to be chosen."""
        return len(self.token_ids) + len(self.drafted)

    @property
    def num_new_tokens(self) -> int:
        return self.position - self.num_prompt_tokens

    @property
    def plain(self) -> bool:
        """Whether the most likely token of the unmodified logits is the answer."""
        return self.sampling.greedy and not self.sampling.penalized and not self._masked_ids

    @property
    def _masked_ids(self) -> tuple[int, ...]:
        return self.stopping.masked_ids(self.num_new_tokens)


@functools.cache
def sampler_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("model.sampler_cpu")


@torch.inference_mode()
def sample(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """The next token of each row. `logits_BV` is fp32 and is not changed.

    NO_TOKEN where one of the logits is NaN or infinite, or none is a number; of those that may not come, -inf says so.
    """
    if logits_BV.device.type != "cpu":
        return sample_by_operators(logits_BV, rows)
    logits, tokens = logits_BV.numpy(), list[int]()
    if all(row.plain for row in rows):
        # Numpy compares whole vectors, and torch takes ten times as long. Of a row with NaN it finds that.
        greedy = logits.argmax(-1)
        finite = np.isfinite(logits[np.arange(len(greedy)), greedy])
        tokens += np.where(finite, greedy, NO_TOKEN).tolist()
    else:
        tokens += sampler_cpu().sample(logits, rows)
    return tokens


@torch.inference_mode()
def sample_by_operators(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """The same on any device."""
    if all(row.plain for row in rows):
        return _greedy(logits_BV)
    logits_BV = logits_BV.clone()
    for logits_V, row in zip(logits_BV, rows, strict=True):
        _penalize(logits_V, row)
        logits_V[list(row.stopping.masked_ids(row.num_new_tokens))] = -torch.inf
    token_ids = _greedy(logits_BV)
    drawn = [index for index, row in enumerate(rows) if not row.sampling.greedy and token_ids[index] != NO_TOKEN]
    if drawn:
        chosen = _draw(logits_BV[drawn], [rows[index] for index in drawn])
        for index, token_id in zip(drawn, chosen, strict=True):
            token_ids[index] = token_id
    return token_ids


def _greedy(logits_BV: torch.Tensor) -> list[int]:
    """Of a row with NaN that is the largest."""
    largest_B, index_B = logits_BV.max(-1)
    token_ids: list[int] = index_B.where(largest_B.isfinite(), NO_TOKEN).tolist()
    return token_ids


def filtered_probabilities(logits_BV: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The distribution `[B, V]` after temperature, top-k, top-p and min-p, in fp64; at least one token stays."""
    parameters = torch.tensor(
        [(s.temperature, s.top_k, s.top_p, s.min_p) for s in samplings], device=logits_BV.device, dtype=torch.float64
    )
    temperature, top_k, top_p, min_p = parameters.unsqueeze(-1).unbind(1)
    logits_BV = logits_BV / temperature.clamp(min=LEAST_TEMPERATURE).to(logits_BV.dtype)
    logits_BV = _keep_top_k(logits_BV, top_k.long())
    probs_BV = logits_BV.double().softmax(-1)
    if any(s.top_p < 1 for s in samplings):
        probs_BV = _keep_top_p(probs_BV, top_p)
    if any(s.min_p > 0 for s in samplings):
        probs_BV = probs_BV.masked_fill(probs_BV < min_p * probs_BV.amax(-1, keepdim=True), 0)
    return probs_BV / probs_BV.sum(-1, keepdim=True)


@torch.inference_mode()
def logprobs(logits_BV: torch.Tensor, token_ids: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of the given tokens and of the `num_top` most likely, or of all, before any processor."""
    logprobs_BV = logits_BV.log_softmax(-1)
    chosen = logprobs_BV.gather(1, torch.tensor(token_ids, device=logits_BV.device).unsqueeze(1)).squeeze(1).tolist()
    top = logprobs_BV.topk(min(num_top, logprobs_BV.shape[1]), dim=-1)
    return [
        TokenLogprob(token_id=token_id, logprob=logprob, top=tuple(zip(ids, values, strict=True)))
        for token_id, logprob, ids, values in zip(
            token_ids, chosen, top.indices.tolist(), top.values.tolist(), strict=True
        )
    ]


class _Philox(threading.local):
    """A generator for each thread. Numpy takes six times as long to make one as to put one anywhere else."""

    def __init__(self) -> None:
        self._generator = np.random.Philox(key=0)
        # Its buffer is empty, so that the next number is that of the counter.
        self._state: Any = self._generator.state

    def bits(self, key: int, counter: tuple[int, int]) -> int:
        """64 of them, those of `np.random.Philox(key=key, counter=[*counter, 0, 0])`."""
        self._state["state"]["key"][0] = key
        self._state["state"]["counter"][:2] = counter
        self._generator.state = self._state
        drawn: int = self._generator.random_raw()
        return drawn


_philox = _Philox()


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) from a counter-based generator (Philox, Salmon et al., 2011)."""
    return float(_philox.bits(seed, (position, choice)) >> 11) * 2.0**-53


def _penalize(logits_V: torch.Tensor, row: SampleRow) -> None:
    """Repetition penalty (Keskar et al., CTRL, 2019) over prompt and answer; presence and frequency over the answer."""
    sampling = row.sampling
    if not sampling.penalized:
        return
    token_ids = [*row.token_ids, *row.drafted]
    if sampling.repetition_penalty != 1.0:
        seen = torch.tensor(token_ids, device=logits_V.device).unique()
        values = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    answer = torch.tensor(token_ids[row.num_prompt_tokens :], dtype=torch.long, device=logits_V.device)
    generated, counts = answer.unique(return_counts=True)
    logits_V[generated] -= sampling.presence_penalty + sampling.frequency_penalty * counts


def _draw(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> list[int]:
    """Inverse-transform sampling in vocabulary order.

    An order by probability would let rounding swap near-equal tokens and change the draw; vocabulary order only moves
    a boundary by the rounding itself.
    """
    cumulative_BV = filtered_probabilities(logits_BV, [row.sampling for row in rows]).cumsum(-1)
    points = [uniform(row.sampling.seed, row.choice, row.position) for row in rows]
    points_B1 = torch.tensor(points, dtype=torch.float64, device=logits_BV.device).unsqueeze(1)
    # Strictly above the point, so that a token of probability zero is never drawn.
    drawn_B = torch.searchsorted(cumulative_BV, points_B1 * cumulative_BV[:, -1:], right=True).squeeze(1)
    token_ids: list[int] = drawn_B.clamp(max=logits_BV.shape[1] - 1).tolist()
    return token_ids


def _keep_top_k(logits_BV: torch.Tensor, top_k_B1: torch.Tensor) -> torch.Tensor:
    largest = int(top_k_B1.max())
    if largest == 0:
        return logits_BV
    values = logits_BV.topk(min(largest, logits_BV.shape[1]), dim=-1).values
    kth_B1 = values.gather(1, (top_k_B1 - 1).clamp(min=0, max=values.shape[1] - 1))
    return logits_BV.masked_fill((logits_BV < kth_B1) & (top_k_B1 > 0), -torch.inf)


def _keep_top_p(probs_BV: torch.Tensor, top_p_B1: torch.Tensor) -> torch.Tensor:
    """The smallest set of most likely tokens whose probability reaches `top_p` (nucleus sampling, Holtzman et al.,
    2019); of equals the first."""
    descending, order = probs_BV.sort(dim=-1, descending=True, stable=True)
    dropped = descending.cumsum(-1) - descending >= top_p_B1
    dropped[:, 0] = False
    return probs_BV.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), 0)
