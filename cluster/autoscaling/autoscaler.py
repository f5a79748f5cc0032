"""The autoscaler's control law: from what the pools report to how large they should be. Pure.

Each pool's demand (`demand`) is followed ahead by its trend (`forecast`), bounded, held back by delays (`stabilizer`),
and made to fit the budget (`budget`). Experts are a pool with a second measure, the redundancy of their slots
(`redundancy`): where imbalance and not load is the cause, replicas are added and not shards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from cluster.autoscaling.budget import fit
from cluster.autoscaling.demand import Demand, decode_demand, expert_demand, measured_capacity, prefill_demand
from cluster.autoscaling.forecast import Trend, forecast, observe, rises
from cluster.autoscaling.redundancy import wanted_redundancy
from cluster.autoscaling.signals import PoolSignals, Signals
from cluster.autoscaling.stabilizer import NOTHING_YET, Proposal, Stabilizer, act, note, propose, settle, undo
from cluster.members import POOLS, Pool
from octet.autoscaler_config import AutoscalerConfig, PoolScalingConfig

REDUNDANCY = "redundant_experts"
"""Decided like a pool's size, and named like one in decisions."""
_CAPACITY_MEMORY = 0.2
"""The weight of one period in what a member is known to compute."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What the law has to know of the cluster beside its load."""

    gpus_per_member: Mapping[Pool, float]
    """1 where members hold no GPU: then the budget counts members."""
    max_batch: int
    """Sequences in a decode worker's batch."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolState:
    stabilizer: Stabilizer = NOTHING_YET
    trend: Trend | None = None
    capacity: float | None = None
    """Tokens per second of a busy member."""
    missing_since_s: float | None = None
    """Since when every look has found requests that miss their target, or are about to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the law remembers from one decision to the next."""

    prefill: PoolState = PoolState()
    decode: PoolState = PoolState()
    experts: PoolState = PoolState()
    redundancy: Stabilizer = NOTHING_YET


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PoolDecision:
    """What is to become of one pool."""

    pool: str
    """prefill, decode, experts or redundant_experts."""
    current: int
    wanted: int
    """By its load alone, within its bounds."""
    target: int
    """`current` where nothing is to be done."""
    reason: str

    @property
    def acts(self) -> bool:
        return self.target != self.current


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    now_s: float
    pools: tuple[PoolDecision, ...]

    @property
    def actions(self) -> tuple[PoolDecision, ...]:
        return tuple(pool for pool in self.pools if pool.acts)


def decide(
    now_s: float, signals: Signals, config: AutoscalerConfig, fleet: Fleet, state: State
) -> tuple[Decision, State]:
    """One decision for every pool, and the state for the next.

    A target is an instruction: whoever acts on it reports its progress with the next signals (`num_starting`,
    `num_draining`). Until a pool has arrived at its target, or `action_timeout_s` is over, it gets no other.
    """
    wanted, proposals, states = {}, {}, {}
    for pool in POOLS:
        before: PoolState = getattr(state, pool)
        wanted[pool], proposals[pool], states[pool] = _consider(now_s, pool, signals, config, fleet, before)
    sizes = {pool: _size(_signals(signals, pool)) for pool in POOLS}
    targets, short = fit(
        sizes={pool: max(sizes[pool], _under_way(states[pool], 0)) for pool in POOLS},
        draining={pool: _signals(signals, pool).num_draining for pool in POOLS},
        targets={pool: _under_way(states[pool], proposals[pool].target) for pool in POOLS},
        minima={pool: _bounds(config, pool, signals).min_replicas for pool in POOLS},
        gpus=fleet.gpus_per_member,
        max_gpus=config.max_gpus,
    )
    decisions = []
    for pool in POOLS:
        target, reason = proposals[pool].target, wanted[pool][1]
        if states[pool].stabilizer.pending is None:
            target = targets[pool]
        if pool == "experts" and target == 0 < sizes[pool] and _workers_there(signals):
            target = targets[pool] = min(sizes[pool], _bounds(config, pool, signals).min_replicas)
            reason += "; shards leave after the workers"
        if pool in short:
            reason += f"; the budget of {config.max_gpus:g} GPUs has room for {targets[pool]}"
        if proposals[pool].why:
            reason += f" ({proposals[pool].why})"
        if target != sizes[pool]:
            settled = act(states[pool].stabilizer, now_s, sizes[pool], target)
            states[pool] = dataclasses.replace(states[pool], stabilizer=settled)
        decisions.append(
            PoolDecision(pool=pool, current=sizes[pool], wanted=wanted[pool][0], target=target, reason=reason)
        )
    steady = states["experts"].stabilizer.pending is None
    redundancy, stabilizer = _redundancy(now_s, signals, config, state.redundancy, targets["experts"], steady)
    decision = Decision(now_s=now_s, pools=(*decisions, redundancy))
    return decision, State(**states, redundancy=stabilizer)


def give_up(state: State, pool: str) -> State:
    """After an action that failed: the pool is as it was, and may get another target at once."""
    if pool == REDUNDANCY:
        return dataclasses.replace(state, redundancy=undo(state.redundancy))
    of_pool: PoolState = getattr(state, pool)
    changed: dict[str, Any] = {pool: dataclasses.replace(of_pool, stabilizer=undo(of_pool.stabilizer))}
    return dataclasses.replace(state, **changed)


def _consider(
    now_s: float, pool: Pool, signals: Signals, config: AutoscalerConfig, fleet: Fleet, state: PoolState
) -> tuple[tuple[int, str], Proposal, PoolState]:
    """What one pool wants, and what its delays make of it."""
    mine, bounds = _signals(signals, pool), _bounds(config, pool, signals)
    current = _size(mine)
    stabilizer, lapsed = settle(
        state.stabilizer, now_s, len(mine.members), mine.num_starting + mine.num_draining, config.action_timeout_s
    )
    capacity = _learned(state.capacity, measured_capacity(mine, config.cold_start_s))
    demand = _demand(pool, signals, config, fleet, capacity)
    # What was before a pool was empty tells nothing of the load that wakes it.
    trend = observe(state.trend, now_s, demand.load) if mine.members else None
    looks_ahead = trend is not None and config.forecast_horizon_s > 0
    ahead = forecast(trend, config.forecast_horizon_s) if trend is not None and looks_ahead else 0.0
    may_be_empty = getattr(config, pool).min_replicas == 0
    wanted, reason = _wanted(current, demand, ahead, config, bounds, signals, may_be_empty)
    if lapsed:
        reason = f"{lapsed}; {reason}"
    missing_since_s = None
    if demand.correction > 0:
        missing_since_s = now_s if state.missing_since_s is None else state.missing_since_s
    lasting = _lasting(wanted, current, demand, trend, ahead, config, bounds)
    stabilizer = note(stabilizer, now_s, wanted, bounds, config.reversal_cooldown_s, lasting)
    if current == 0 and wanted > 0 and stabilizer.pending is None:
        proposal = Proposal(wanted, "at once, as nothing serves")
    else:
        proposal = propose(
            stabilizer,
            now_s,
            current,
            bounds,
            config.reversal_cooldown_s,
            slope_per_s=trend.slope if trend is not None and looks_ahead else 0.0,
            urgent=missing_since_s is not None and now_s - missing_since_s >= config.urgent_delay_s,
        )
    after = PoolState(stabilizer=stabilizer, trend=trend, capacity=capacity, missing_since_s=missing_since_s)
    return (wanted, reason), proposal, after


def _wanted(
    current: int,
    demand: Demand,
    ahead: float,
    config: AutoscalerConfig,
    bounds: PoolScalingConfig,
    signals: Signals,
    may_be_empty: bool,
) -> tuple[int, str]:
    """Whole members, and the signal that asks for them."""
    if current == 0:
        if signals.requests_waiting:
            waiting = f"{signals.requests_waiting} request{'s' if signals.requests_waiting > 1 else ''}"
            return bounds.min_replicas, f"an empty pool, and {waiting} to serve"
        return 0 if may_be_empty else bounds.min_replicas, "nothing is asked for"
    idle = (
        signals.requests_waiting == 0
        and signals.arriving_prompt_tokens_per_s == 0
        and not any(member.ongoing for member in (*signals.prefill.members, *signals.decode.members))
    )
    if idle and may_be_empty:
        return 0, "nothing is asked for"
    need, reason = max(
        (demand.load, demand.load_reason),
        (_floor(ahead, demand), f"{ahead:.1f} members forecast in {config.forecast_horizon_s:g} s"),
        (demand.correction, demand.correction_reason),
        key=lambda one: one[0],
    )
    near = ", near enough" if _is_near(need, current, config) else ""
    return _whole(need, current, config, bounds), f"{reason}: {need:.1f} members{near}"


def _workers_there(signals: Signals) -> bool:
    """Whether anybody may still ask shards for something."""
    return any(pool.members or pool.num_starting or pool.num_draining for pool in (signals.prefill, signals.decode))


def _lasting(
    wanted: int,
    current: int,
    demand: Demand,
    trend: Trend | None,
    ahead: float,
    config: AutoscalerConfig,
    bounds: PoolScalingConfig,
) -> int:
    """What a pool is not to shrink below on account of this moment: by its smoothed load, and no more than `wanted`.

    Chance is provided for by the reserve in every load. A pool that kept the most that a burst has asked for would
    provide for it twice. While its load rises, though, a pool keeps what it has: what it gave back in a lull it could
    not have again before `reversal_cooldown_s`.
    """
    if trend is None or current == 0 or demand.correction > 0:
        return wanted
    if wanted > 0 and rises(trend, config.tolerance):
        return max(wanted, current)
    return min(wanted, _whole(max(trend.level, _floor(ahead, demand)), current, config, bounds))


def _floor(ahead: float, demand: Demand) -> int:
    """Of a forecast, whole members only; and it may no more than double what the load itself asks for."""
    return math.floor(min(ahead, 2 * max(demand.load, 1.0)))


def _is_near(need: float, current: int, config: AutoscalerConfig) -> bool:
    return abs(need / current - 1) <= config.tolerance


def _whole(need: float, current: int, config: AutoscalerConfig, bounds: PoolScalingConfig) -> int:
    if _is_near(need, current, config):
        return _clipped(current, bounds)
    factor = bounds.upscaling_factor if need > current else bounds.downscaling_factor
    return _clipped(max(1, math.ceil(current + (need - current) * factor - 1e-9)), bounds)


def _redundancy(
    now_s: float, signals: Signals, config: AutoscalerConfig, state: Stabilizer, num_shards: int, steady: bool
) -> tuple[PoolDecision, Stabilizer]:
    """Slots per layer beyond one for each expert, within what `num_shards` shards can hold.

    Args:
        steady: the number of shards is not about to change; if it is, slots are planned anew anyway.
    """
    experts, bounds = signals.experts, config.experts
    current = experts.num_redundant_experts
    if num_shards == 0 or not experts.members:
        # Those that come hold as many as there were.
        reason = "no shard serves"
        return PoolDecision(pool=REDUNDANCY, current=current, wanted=current, target=current, reason=reason), state
    wanted, reason = wanted_redundancy(experts, bounds, config.cold_start_s)
    room = max(0, num_shards * experts.slots_that_fit - experts.num_experts)
    if wanted > room:
        wanted, reason = room, f"{reason}; {num_shards} shards have room for {room}"
    if state.pending is not None and current != state.pending.origin:
        # How many there are in the end also depends on how many shards share them evenly.
        state = dataclasses.replace(state, pending=None)
    state, _ = settle(state, now_s, current, 0, config.action_timeout_s)
    state = note(state, now_s, wanted, bounds, config.reversal_cooldown_s)
    if state.pending is None and current > room:
        proposal = Proposal(room, "at once")
    elif not steady:
        proposal = Proposal(current, "the number of shards changes first")
    else:
        proposal = propose(state, now_s, current, bounds, config.reversal_cooldown_s)
    if proposal.target != current:
        state = act(state, now_s, current, proposal.target)
    if proposal.why:
        reason += f" ({proposal.why})"
    return PoolDecision(pool=REDUNDANCY, current=current, wanted=wanted, target=proposal.target, reason=reason), state


def _demand(pool: Pool, signals: Signals, config: AutoscalerConfig, fleet: Fleet, capacity: float | None) -> Demand:
    match pool:
        case "prefill":
            return prefill_demand(signals, config, capacity)
        case "decode":
            return decode_demand(signals, config, fleet.max_batch)
        case "experts":
            return expert_demand(signals, config)


def _learned(known: float | None, measured: float | None) -> float | None:
    if known is None or measured is None:
        return measured if known is None else known
    return known + _CAPACITY_MEMORY * (measured - known)


def _signals(signals: Signals, pool: Pool) -> PoolSignals:
    of_pool: PoolSignals = getattr(signals, pool)
    return of_pool


def _bounds(config: AutoscalerConfig, pool: Pool, signals: Signals) -> PoolScalingConfig:
    """Of a pool that serves: one member at least, and as many shards as hold every expert, whatever the config says."""
    bounds: PoolScalingConfig = getattr(config, pool)
    least = max(1, bounds.min_replicas)
    if pool == "experts" and signals.experts.slots_that_fit:
        least = max(least, math.ceil(signals.experts.num_experts / signals.experts.slots_that_fit))
    return bounds.model_copy(update={"min_replicas": least, "max_replicas": max(least, bounds.max_replicas)})


def _size(pool: PoolSignals) -> int:
    """Members that will be there when everything under way is done."""
    return len(pool.members) + pool.num_starting


def _under_way(state: PoolState, target: int) -> int:
    pending = state.stabilizer.pending
    return target if pending is None else pending.target


def _clipped(count: int, bounds: PoolScalingConfig) -> int:
    return min(max(count, bounds.min_replicas), bounds.max_replicas)
