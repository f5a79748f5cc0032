"""From what processes recorded to where a step's time went. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from ops.bench.breakdown.records import Round, ShardCall, Step

GEMM_PARTS = ("attention_linear", "mlp_linear", "gate_linear", "head_linear")
WAIT_PARTS = ("experts_wait", "way_wait")
"""Of `exchange_wait`: while a shard computes, and while none does."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedRound:
    """A round with the calls that it made: `total_s` is `experts_s` and `way_s`."""

    round: Round
    calls: tuple[ShardCall, ...]

    @property
    def total_s(self) -> float:
        return self.round.received_s - self.round.sent_s

    @property
    def experts_s(self) -> float:
        """Of the shard that takes longest."""
        return max(call.total_s for call in self.calls)

    @property
    def way_s(self) -> float:
        """All but that: packing, both ways, how much later one shard begins than another, and what of the shared
        expert takes longer than they and the experts."""
        return self.total_s - self.experts_s

    @property
    def experts_wait_s(self) -> float:
        """How long the attention worker waited while at least one shard computed."""
        first = min(call.start_s for call in self.calls)
        last = max(call.stop_s for call in self.calls)
        return max(0.0, min(self.round.received_s, last) - max(self.round.wait_s, first))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServedStep:
    """A step whose every round has its calls."""

    step: Step
    rounds: tuple[ServedRound, ...]

    @property
    def attention_s(self) -> float:
        """All that is in no round."""
        return self.step.lap.total_s - sum(served.total_s for served in self.rounds)

    @property
    def displaced_s(self) -> float:
        """How long the worker was ready to run, and did not."""
        lap = self.step.lap
        return sum(lap.parts[part] - running for part, running in lap.running.items() if part != "exchange_wait")

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part, with the exchange's wait divided in two. They add up to the step's time."""
        parts = dict(self.step.lap.parts)
        waited_s = parts.pop("exchange_wait", 0.0)
        experts_s = min(waited_s, sum(served.experts_wait_s for served in self.rounds))
        return parts | {"experts_wait": experts_s, "way_wait": waited_s - experts_s}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """The mean of the middle half of steps."""

    num_steps: int
    """That it is the mean of."""
    num_attended: float
    step_s: float
    parts: dict[str, float]
    """Seconds; they add up to `step_s`."""
    displaced_s: float
    """Of the parts that do not wait: seconds in which other processes had the core."""

    @property
    def other_share(self) -> float:
        """Of the step, what is neither GEMM nor exchange wait."""
        named = sum(self.parts.get(part, 0.0) for part in (*GEMM_PARTS, *WAIT_PARTS))
        return 1 - named / self.step_s


def steady(steps: Sequence[Step], num_sequences: int) -> list[Step]:
    """Decode steps of so many sequences, without those in which sequences joined."""
    return [
        after
        for before, after in itertools.pairwise(steps)
        if before.num_sequences == after.num_sequences == after.num_tokens == num_sequences
        and before.lap.stop_s == after.lap.start_s
    ]


def serve(steps: Iterable[Step], calls: Iterable[Sequence[ShardCall]]) -> list[ServedStep]:
    """Find the calls of every round. Steps of which one is missing are left out.

    Args:
        calls: of each shard, in order.
    """
    by_layer: list[dict[int, list[ShardCall]]] = []
    for of_shard in calls:
        layers: dict[int, list[ShardCall]] = defaultdict(list)
        for call in of_shard:
            layers[call.layer].append(call)
        by_layer.append(layers)
    served = []
    for step in steps:
        rounds = []
        for one in step.rounds:
            found = [taken for layers in by_layer if (taken := _take(layers[one.layer], one)) is not None]
            if found:
                rounds.append(ServedRound(round=one, calls=tuple(found)))
        if len(rounds) == len(step.rounds):
            served.append(ServedStep(step=step, rounds=tuple(rounds)))
    return served


def summarize(steps: Sequence[ServedStep]) -> Breakdown:
    """Raises: ValueError if there is none."""
    if not steps:
        raise ValueError("no step was recorded")
    middle = middle_half(steps)
    parts: dict[str, float] = defaultdict(float)
    for served in middle:
        for part, seconds in served.parts.items():
            parts[part] += seconds / len(middle)
    return Breakdown(
        num_steps=len(middle),
        num_attended=statistics.fmean(served.step.num_attended for served in middle),
        step_s=statistics.fmean(served.step.lap.total_s for served in middle),
        parts=dict(parts),
        displaced_s=statistics.fmean(served.displaced_s for served in middle),
    )


def middle_half(steps: Sequence[ServedStep]) -> list[ServedStep]:
    """Those that took neither longest nor shortest."""
    ordered = sorted(steps, key=lambda served: served.step.lap.total_s)
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]


def _take(calls: list[ShardCall], one: Round) -> ShardCall | None:
    """The first call within the round; those before it are of no use any more."""
    while calls and calls[0].start_s < one.sent_s:
        del calls[0]
    return calls.pop(0) if calls and calls[0].start_s <= one.received_s else None
