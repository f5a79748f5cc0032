"""One definition of a rate for every contestant, medians over rounds, and ratios against the goals. Pure.

A trial submits `N` prompts of `P` tokens at once, greedy, and waits for the last token of the last one. Two trials with
new prompts follow each other: one token each takes `T1` seconds, `M + 1` tokens each take `T2`, medians of several
with different prompts where `N` is small.

    prefill rate = N · P / T1            prompt tokens per second until every prompt has its first token
    decode rate  = N · M / (T2 − T1)     what `M` more tokens each cost, whatever overlaps with what
    whole rate   = N · (M + 1) / T2      new tokens per second, prompts included
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ops.bench.spread import Spread, spread


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One contestant's two kinds of run in one round."""

    streams: int
    prompt_tokens: int
    new_tokens: int
    """`M`: the second run makes one more."""
    first_s: float
    all_s: float

    @property
    def prefill_rate(self) -> float:
        return self.streams * self.prompt_tokens / self.first_s

    @property
    def decode_rate(self) -> float:
        """Infinite if the second run was no longer than the first, as noise can have it with very short runs."""
        decode_s = self.all_s - self.first_s
        return self.streams * self.new_tokens / decode_s if decode_s > 0 else float("inf")

    @property
    def whole_rate(self) -> float:
        return self.streams * (self.new_tokens + 1) / self.all_s


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Octet's rate over a peer's is at least this."""

    kind: str
    """`decode` or `prefill`."""
    streams: int | None
    """None: at every number of streams."""
    peer: str
    ratio: float


GOALS = (
    Goal(kind="decode", streams=1, peer="vllm", ratio=1.0),
    Goal(kind="decode", streams=8, peer="vllm", ratio=1.0),
    Goal(kind="decode", streams=32, peer="vllm", ratio=1.0),
    Goal(kind="decode", streams=8, peer="transformers", ratio=2.5),
    Goal(kind="decode", streams=32, peer="transformers", ratio=2.5),
    Goal(kind="prefill", streams=None, peer="vllm", ratio=1.2),
    Goal(kind="decode", streams=None, peer="local", ratio=0.85),
)


def rate_of(trial: Trial, kind: str) -> float:
    return {"prefill": trial.prefill_rate, "decode": trial.decode_rate, "whole": trial.whole_rate}[kind]


def ratios(ours: Sequence[Trial], theirs: Sequence[Trial], kind: str) -> Spread:
    """Ours over theirs, round by round: what moves the machine in a round moves both."""
    pairs = zip(ours, theirs, strict=True)
    return spread([rate_of(our, kind) / rate_of(their, kind) for our, their in pairs])


def goal_of(kind: str, streams: int, peer: str, goals: Sequence[Goal] = GOALS) -> Goal | None:
    for goal in goals:
        if goal.kind == kind and goal.peer == peer and goal.streams in (None, streams):
            return goal
    return None


Trials = Mapping[tuple[str, int], Sequence[Trial]]
"""By contestant and number of streams, one per round."""
