"""What a step costs as a function of its size, fitted to what was measured: the simulator's CPU profile.

decode step = attention(sequences, attended)
                + Σ over MoE layers (exchange(bytes) + max over shards expert(experts, pairs))
prefill step = prefill(tokens, attended)

What they take of processors is fitted beside it: where members share cores, it is what they leave to each other.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from ops.bench.breakdown.analysis import ServedStep
from ops.bench.breakdown.records import ShardCall, Step

_FAR = 2.0
"""Times the fit."""
_ATTENTION = ("fixed_s", "per_sequence_s", "per_attended_s")
_EXPERT = ("fixed_s", "per_expert_s", "per_pair_s")
_PREFILL = ("fixed_s", "per_token_s", "per_attended_s")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCosts:
    """Of the attention worker's own part of a decode step, over all layers."""

    fixed_s: float
    per_sequence_s: float
    per_attended_s: float
    """Per position attended to, summed over the sequences: their contexts."""

    def seconds(self, num_sequences: float, num_attended: float) -> float:
        return self.fixed_s + self.per_sequence_s * num_sequences + self.per_attended_s * num_attended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCosts:
    """Of one call of a shard: one layer."""

    fixed_s: float
    per_expert_s: float
    """Per expert that at least one row asks for: its weights are read."""
    per_pair_s: float
    """Per (row, expert) pair."""

    def seconds(self, num_experts: float, num_pairs: float) -> float:
        return self.fixed_s + self.per_expert_s * num_experts + self.per_pair_s * num_pairs


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeCosts:
    """Of the rows' way of one layer, all shards together: packing, there and back."""

    fixed_s: float
    per_byte_s: float
    """Per byte there and back, over all shards."""

    def seconds(self, num_bytes: float) -> float:
        return self.fixed_s + self.per_byte_s * num_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCosts:
    """Of a step of prefill, experts and their exchange included, on the division that was measured."""

    fixed_s: float
    per_token_s: float
    per_attended_s: float
    """Per position that a token attends to, summed over the tokens: `n (n + 1) / 2` for a whole prompt of n."""

    def seconds(self, num_tokens: float, num_attended: float) -> float:
        return self.fixed_s + self.per_token_s * num_tokens + self.per_attended_s * num_attended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCosts:
    """From a sequence's first token to its first step, while nothing else is done."""

    fixed_s: float
    per_byte_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorCosts:
    """Processor time, over all threads, however long it took to get it."""

    decode_cores: float
    """That the decode worker uses, in the mean, while it does not wait for shards."""
    prefill: PrefillCosts
    """Of the prefill worker, without the experts."""
    expert: ExpertCosts
    """Of a shard, for a call, with receiving and replying."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    attention: AttentionCosts
    expert: ExpertCosts
    exchange: ExchangeCosts
    prefill: PrefillCosts
    handoff: HandoffCosts
    processor: ProcessorCosts
    error: dict[str, float]
    """By the same names, and for whole steps of decode: the median of |fitted ÷ measured − 1|."""


def fit_costs(
    decode: Sequence[ServedStep],
    calls: Sequence[ShardCall],
    prefill: Sequence[Step],
    handoffs: Sequence[tuple[int, float]],
) -> Costs:
    """
    Args:
        decode: steady steps of several numbers of sequences and contexts.
        calls: of every shard.
        handoffs: bytes, and seconds.
    """
    rounds = [served for step in decode for served in step.rounds]
    of_decode = [(1, served.step.num_sequences, served.step.num_attended) for served in decode]
    of_calls = [(1, call.num_experts, call.num_pairs) for call in calls]
    of_prefill = [(1, step.num_tokens, step.num_attended) for step in prefill]
    attention = AttentionCosts(**_fit(_ATTENTION, of_decode, [served.attention_s for served in decode]))
    expert = ExpertCosts(**_fit(_EXPERT, of_calls, [call.total_s for call in calls]))
    exchange = ExchangeCosts(
        **_fit(
            ("fixed_s", "per_byte_s"),
            [(1, served.round.num_bytes) for served in rounds],
            [served.way_s for served in rounds],
        )
    )
    whole_prefill = PrefillCosts(**_fit(_PREFILL, of_prefill, [step.lap.total_s for step in prefill]))
    of_shards = ExpertCosts(**_fit(_EXPERT, of_calls, [call.processor_s for call in calls]))

    def own_s(served: ServedStep) -> float:
        at_shards_s = sum(
            max(of_shards.seconds(call.num_experts, call.num_pairs) for call in one.calls) for one in served.rounds
        )
        return served.step.lap.total_s - at_shards_s

    def step_s(served: ServedStep) -> float:
        step = served.step
        return attention.seconds(step.num_sequences, step.num_attended) + sum(
            exchange.seconds(one.round.num_bytes)
            + max(expert.seconds(call.num_experts, call.num_pairs) for call in one.calls)
            for one in served.rounds
        )

    return Costs(
        attention=attention,
        expert=expert,
        exchange=exchange,
        prefill=whole_prefill,
        handoff=HandoffCosts(
            **_fit(
                ("fixed_s", "per_byte_s"),
                [(1, num_bytes) for num_bytes, _ in handoffs],
                [seconds for _, seconds in handoffs],
            )
        ),
        processor=ProcessorCosts(
            decode_cores=statistics.median(served.step.processor_s / own_s(served) for served in decode),
            prefill=PrefillCosts(**_fit(_PREFILL, of_prefill, [step.processor_s for step in prefill])),
            expert=of_shards,
        ),
        error={
            "attention": _error(
                (attention.seconds(s.step.num_sequences, s.step.num_attended), s.attention_s) for s in decode
            ),
            "expert": _error((expert.seconds(c.num_experts, c.num_pairs), c.total_s) for c in calls),
            "exchange": _error((exchange.seconds(one.round.num_bytes), one.way_s) for one in rounds),
            "prefill": _error((whole_prefill.seconds(s.num_tokens, s.num_attended), s.lap.total_s) for s in prefill),
            "decode_step": _error((step_s(served), served.step.lap.total_s) for served in decode),
        },
    )


def fit_nonnegative(sizes: npt.NDArray[np.float64], seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Coefficients, none below zero, whose squared errors relative to `seconds` are least.

    A coefficient that comes out negative is fixed at zero, the most negative first, and the others are fitted again.

    Args:
        sizes: `[samples, coefficients]`.
    """
    relative = sizes / seconds[:, None]
    kept = list(range(sizes.shape[1]))
    while kept:
        found = np.linalg.lstsq(relative[:, kept], np.ones(len(seconds)), rcond=None)[0]
        if found.min() >= 0:
            coefficients = np.zeros(sizes.shape[1])
            coefficients[kept] = found
            return coefficients
        del kept[int(found.argmin())]
    return np.zeros(sizes.shape[1])


def _fit(names: Sequence[str], sizes: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> dict[str, float]:
    """Samples that took much longer than others of their size, as when the machine did something else, are left out."""
    wanted, measured = np.array(sizes, np.float64), np.array(seconds, np.float64)
    coefficients = fit_nonnegative(wanted, measured)
    near = measured <= _FAR * (wanted @ coefficients)
    if near.sum() > len(names):
        coefficients = fit_nonnegative(wanted[near], measured[near])
    return dict(zip(names, coefficients.tolist(), strict=True))


def _error(pairs: Iterable[tuple[float, float]]) -> float:
    return statistics.median(abs(fitted / measured - 1) for fitted, measured in pairs)
