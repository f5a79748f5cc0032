"""What a simulated run comes to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Literal

from ops.bench.summary import Percentiles, percentiles

End = Literal["finished", "shed", "refused", "failed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How one request ended. Times are from its arrival."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    end: End
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    """0 where there was one token only."""
    in_slo: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The cluster at one time."""

    at_s: float
    sizes: Mapping[str, int]
    """Members that hold GPUs, by pool."""
    serving: Mapping[str, int]
    arrivals_per_s: float
    queued_prompt_tokens: float
    live: int
    shard_busy: float
    kv_occupancy: float
    balancedness: float
    tokens_per_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One change of one pool, and why."""

    at_s: float
    pool: str
    before: int
    after: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    served: tuple[Served, ...]
    moments: tuple[Moment, ...]
    actions: tuple[Action, ...]
    duration_s: float
    """Until the last request ended."""
    gpu_hours: Mapping[str, float]
    """By pool, from the order of a member to its release."""
    slots_filled: int
    """By rebalances."""
    wall_s: float
    """What the simulation itself took."""
    lost: int = 0
    """Members, on purpose."""
    restarts: int = 0
    """Requests that began again for it, each as often as it did."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    requests: int
    finished: int
    shed: int
    refused: int
    """Longer than the KV pages of a worker."""
    failed: int
    """Begun again more often than `frontend.max_attempts` allows."""
    slo_attainment: float
    """Of all requests; one that was shed, refused or failed missed its target."""
    goodput_per_s: float
    """Requests per second that kept both targets."""
    tokens_per_s: float
    duration_s: float
    ttft_s: Percentiles
    tpot_s: Percentiles
    gpu_hours: float
    gpu_hours_by_pool: dict[str, float]
    cost: float
    """GPU hours at the price given."""
    most: dict[str, int]
    """The largest sizes of the pools."""
    mean: dict[str, float]
    actions: int
    most_reversals: int
    """Of any pool's direction within 10 minutes."""
    slots_filled: int
    wall_s: float
    lost: int
    restarts: int


_WINDOW_S = 600.0


def summarized(run: Run, price: float) -> Result:
    """Rates and means are 0 of a run that took no time, in which no request was computed."""
    finished = [one for one in run.served if one.end == "finished"]
    kept = sum(one.in_slo for one in finished)
    pools = run.gpu_hours.keys()
    per_s = 1 / run.duration_s if run.duration_s > 0 else 0.0
    return Result(
        requests=len(run.served),
        finished=len(finished),
        shed=sum(one.end == "shed" for one in run.served),
        refused=sum(one.end == "refused" for one in run.served),
        failed=sum(one.end == "failed" for one in run.served),
        slo_attainment=kept / len(run.served),
        goodput_per_s=kept * per_s,
        tokens_per_s=sum(one.new_tokens for one in finished) * per_s,
        duration_s=run.duration_s,
        ttft_s=percentiles([one.ttft_s for one in finished]),
        tpot_s=percentiles([one.tpot_s for one in finished if one.new_tokens > 1]),
        gpu_hours=sum(run.gpu_hours.values()),
        gpu_hours_by_pool=dict(run.gpu_hours),
        cost=sum(run.gpu_hours.values()) * price,
        most={pool: max(moment.sizes[pool] for moment in run.moments) for pool in pools},
        mean={pool: hours * 3600 * per_s for pool, hours in run.gpu_hours.items()},
        actions=len(run.actions),
        most_reversals=max((_most_reversals(run.actions, pool) for pool in pools), default=0),
        slots_filled=run.slots_filled,
        wall_s=run.wall_s,
        lost=run.lost,
        restarts=run.restarts,
    )


def _most_reversals(actions: tuple[Action, ...], pool: str) -> int:
    """The most changes of direction within any `_WINDOW_S`."""
    mine = [(action.at_s, action.after > action.before) for action in actions if action.pool == pool]
    turns = [at_s for (_, was_up), (at_s, is_up) in itertools.pairwise(mine) if was_up != is_up]
    return max((sum(0 <= other - at_s < _WINDOW_S for other in turns) for at_s in turns), default=0)
