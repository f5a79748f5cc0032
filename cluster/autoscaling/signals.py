"""What the autoscaler decides by: the load of one look-back period, as the cluster and the simulator both report it."""

from __future__ import annotations

import dataclasses

from octet.ids import WorkerId


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemberSample:
    """One serving member over the period. What its pool does not have is 0."""

    worker_id: WorkerId
    age_s: float
    """Since it began to serve; 0 where nothing was heard of it, so that nothing is concluded from its zeros."""
    busy_share: float = 0.0
    """Of the period: prefill, computing prompts or waiting for experts meanwhile; experts, computing frames."""
    tokens_per_s: float = 0.0
    """Prefill: prompt tokens computed; decode: tokens generated; experts: token rows served."""
    kv_occupancy: float = 0.0
    """Attention workers: pages held ÷ all pages, at the end of the period."""
    ongoing: float = 0.0
    """Attention workers: sequences running."""
    waiting: float = 0.0
    """Decode workers: sequences whose prompts are computed and for which there is no room yet."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolSignals:
    """One pool over the period."""

    members: tuple[MemberSample, ...]
    """All that serve."""
    num_starting: int = 0
    num_draining: int = 0
    """Both hold their GPUs."""
    slo_ratio: float | None = None
    """The 95th percentile of what requests took ÷ what their target allows; 1 and less is well. Prefill: time to the
    first token, decode: time per output token. None where no request was answered in the period."""
    expert_wait_share: float = 0.0
    """Of the time of the workers' steps, what they waited for experts (dispatch, shards and combine)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prospect:
    """What the balancer promises for the loads of the period."""

    num_redundant_experts: int
    """Slots per layer beyond one for each expert."""
    balancedness: float
    """Mean over layers, after rebalancing with so many."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSignals(PoolSignals):
    decode_share: float = 0.0
    """Of the shards' busy time, what decode frames took."""
    balancedness: float = 1.0
    """Of the rows served, mean over layers of mean ÷ max over shards, with the present placement."""
    num_redundant_experts: int = 0
    """Of the present placement."""
    slots_that_fit: int = 0
    """Per layer and shard, by a shard's memory."""
    num_experts: int = 0
    prospects: tuple[Prospect, ...] = ()
    """By ascending redundancy. Asking the balancer takes a while, so a period may come without."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """All pools over one period."""

    period_s: float
    queued_prompt_tokens: float
    """Of requests that no worker has begun (given pages to), without what prefix caches hold, at the end of the period.
    What is being computed is none of it: another member could not take it over."""
    arriving_prompt_tokens_per_s: float
    """To be computed, so without what prefix caches hold."""
    requests_waiting: int
    """For anything at all, in whatever pool, at the end of the period."""
    prefill: PoolSignals
    decode: PoolSignals
    experts: ExpertSignals
