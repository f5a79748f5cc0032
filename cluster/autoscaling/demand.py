"""How many members a pool needs for the load that it reports: pure, each number with the words that explain it.

As in Kubernetes' horizontal pod autoscaler, each signal gives a number of members of its own, and the largest counts.
Signals are of two kinds: *load*, which is in proportion to what is asked for and so can be followed ahead of time, and
*correction*, which says that requests miss their target now whatever the load signals say.
"""

from __future__ import annotations

import dataclasses
import math

from cluster.autoscaling.signals import ExpertSignals, MemberSample, PoolSignals, Signals
from octet.autoscaler_config import AutoscalerConfig, ExpertScalingConfig

_LEAST_BUSY = 0.02
"""A member that computed less than this share of the period says nothing about what it could do."""
_MOST_CORRECTION = 1.5
"""A latency is no measure of how much is missing, as queues grow without bound: one correction adds a half at most."""
_LEAST_LEVEL = 0.05
"""Keeps quotients finite."""
_AIM = 0.8
"""Of its target, the 95th percentile that is aimed at, so that the 99th keeps the target."""
_PACE_TARGET = 0.7
"""Of its target, the TPOT that shards are sized for."""
_MOST_OF_MEASURED = 1.25
"""What full shards are asked for is taken for no more than this times what they get done. Shards that are a little too
few make steps several times as long, so that more would be far too many."""
_MOST_OF_HELD = 2.0
"""Pages are stretched, or shrunk, to another pace by no more than this."""
_BLAMES_EXPERTS = 0.5
"""From this share of a step on, what the step waits for is the experts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Members needed, not rounded."""

    load: float
    load_reason: str
    correction: float = 0.0
    """0 where requests keep their target, or another pool is to blame."""
    correction_reason: str = ""


def warm(pool: PoolSignals, cold_start_s: float) -> tuple[MemberSample, ...]:
    """The members whose samples count: compilers, caches and connections are slow at first."""
    return tuple(member for member in pool.members if member.age_s >= cold_start_s)


def measured_capacity(pool: PoolSignals, cold_start_s: float) -> float | None:
    """Tokens per second that a member computes while it is busy; None where no warm one was busy."""
    busy = [member for member in warm(pool, cold_start_s) if member.busy_share >= _LEAST_BUSY]
    if not busy:
        return None
    return sum(member.tokens_per_s for member in busy) / sum(member.busy_share for member in busy) or None


def prefill_demand(signals: Signals, config: AutoscalerConfig, capacity: float | None) -> Demand:
    """What arrives has to be computed at the target's busy share, and what is queued within the target TTFT.

    Args:
        capacity: tokens per second of a busy member, now or when it was last known.
    """
    num = len(signals.prefill.members)
    if capacity is None:
        return Demand(load=num, load_reason="no warm member has computed anything yet")
    target = config.prefill.target_busy_share
    arriving = _staffed(signals.arriving_prompt_tokens_per_s / capacity, target, config.prefill.square_root_staffing)
    queued = signals.queued_prompt_tokens / (capacity * config.target_ttft_s)
    if arriving >= queued:
        reason = (
            f"{signals.arriving_prompt_tokens_per_s:,.0f} prompt tokens/s arrive, a member computes {capacity:,.0f} "
            f"and is to be busy for {target:.2f} of its time"
        )
        load = Demand(load=arriving, load_reason=reason)
    else:
        reason = (
            f"{signals.queued_prompt_tokens:,.0f} prompt tokens are queued, a member computes {capacity:,.0f}/s, "
            f"target TTFT {config.target_ttft_s:g} s"
        )
        load = Demand(load=queued, load_reason=reason)
    return _corrected(load, signals.prefill, num, "TTFT")


def decode_demand(signals: Signals, config: AutoscalerConfig, max_batch: int) -> Demand:
    """KV pages and batches have to have room, for what waits as well."""
    members = warm(signals.decode, config.cold_start_s) or signals.decode.members
    num = len(signals.decode.members)
    if not members:
        return Demand(load=0.0, load_reason="no member serves")
    ongoing = sum(member.ongoing for member in members) / len(members)
    waiting = sum(member.waiting for member in signals.decode.members)
    # Newcomers have room, and samples of them do not count; what they hold was counted where it came from.
    total = ongoing * len(members) + sum(m.ongoing for m in signals.decode.members if m not in members)
    occupancy = sum(member.kv_occupancy for member in members) / len(members)
    held = sum(member.kv_occupancy for member in signals.decode.members)
    per_sequence = occupancy / ongoing if ongoing > 0 else 0.0
    # Sequences stay for as long as their steps take, and the wait for experts is as long as shards are few. Pages are
    # therefore counted as they would be held at the pace that shards are sized for: while shards are faster, more will
    # be held once there are fewer, and while steps wait for them, more decode workers would let no sequence go sooner.
    slower = min(max(1 / _pace(signals, config), 1 / _MOST_OF_HELD), _MOST_OF_HELD)
    stays = 1 + signals.decode.expert_wait_share * (slower - 1)
    filled = (held + waiting * per_sequence) * stays
    by_kv = _staffed(filled, config.decode.target_kv_occupancy, config.decode.square_root_staffing)
    target_ongoing = config.decode.target_ongoing_requests or 0.8 * max_batch
    by_batch = (total + waiting) / target_ongoing
    if by_kv >= by_batch:
        reason = (
            f"KV pages are held to {held / num:.2f} of {config.decode.target_kv_occupancy:.2f}, "
            f"{waiting:.0f} sequences wait"
        )
        load = Demand(load=by_kv, load_reason=reason)
    else:
        reason = f"{(total + waiting) / num:.1f} sequences per member of {target_ongoing:.1f}"
        load = Demand(load=by_batch, load_reason=reason)
    return _corrected(load, signals.decode, num, "TPOT")


def expert_demand(signals: Signals, config: AutoscalerConfig) -> Demand:
    """Shards for the work as it would be if it were level: what is not level is the balancer's affair."""
    experts = signals.experts
    members = warm(experts, config.cold_start_s)
    num = len(experts.members)
    if not members:
        return Demand(load=num, load_reason="no warm shard yet")
    measured = sum(member.busy_share for member in members) / len(members)
    pace = min(_pace(signals, config), _MOST_OF_MEASURED)
    asked = _arriving_of_computed(signals)
    mean = measured * (experts.decode_share * pace + (1 - experts.decode_share) * asked)
    level, target = attainable(experts), config.experts.target_busy_share
    reason = (
        f"shards compute {measured:.2f} of their time, {mean:.2f} with decode at {pace:.2f} of its pace and prompts at "
        f"{asked:.2f}, level to {level:.2f} at best, of {target:.2f}"
    )
    beta = config.experts.square_root_staffing
    # On a promise of the balancer no shard is added; but none is dropped either until it is kept.
    kept = min(num, _staffed(num * mean / max(experts.balancedness, _LEAST_LEVEL), target, beta))
    load = Demand(load=max(kept, _staffed(num * mean / level, target, beta)), load_reason=reason)
    if imbalance_is_the_cause(experts, config.experts, config.cold_start_s):
        return load
    misses = [
        (pool.slo_ratio, name)
        for pool, name in ((signals.prefill, "TTFT"), (signals.decode, "TPOT"))
        if pool.slo_ratio is not None and pool.slo_ratio > _AIM and pool.expert_wait_share >= _BLAMES_EXPERTS
    ]
    # Idle shards answer no sooner for being more: the wait is then the way to them.
    if not misses or mean / level < target / 2:
        return load
    ratio, name = max(misses)
    return dataclasses.replace(
        load,
        correction=num * min(ratio / _AIM, _MOST_CORRECTION),
        correction_reason=f"p95 {name} is {ratio:.2f} of its target, and most of a step is the wait for experts",
    )


def _pace(signals: Signals, config: AutoscalerConfig) -> float:
    """The speed that decode steps need for their target, with something in reserve, ÷ the speed that they have.

    Decode workers step as fast as they can, so shards that are faster are asked for more, and shards that are full look
    no busier for being asked for more: their busy share alone tells of no demand.
    """
    members = [member for member in signals.decode.members if member.ongoing > 0 and member.tokens_per_s > 0]
    if not members:
        return 1.0
    tpot_s = sum(member.ongoing for member in members) / sum(member.tokens_per_s for member in members)
    return tpot_s / (_PACE_TARGET * config.target_tpot_s)


def _arriving_of_computed(signals: Signals) -> float:
    """Prompt tokens that arrive ÷ those computed, where a queue grows: what shards were asked for by prompts is then
    less than what they will be asked for. Prompts that do not come are not computed, so it is no less than 1."""
    computed = sum(member.tokens_per_s for member in signals.prefill.members)
    if computed <= 0:
        return 1.0
    return min(max(signals.arriving_prompt_tokens_per_s / computed, 1.0), _MOST_OF_MEASURED)


def attainable(experts: ExpertSignals) -> float:
    """The best balancedness that the balancer promises; what is measured, where nobody has asked it."""
    return max(experts.balancedness, *(prospect.balancedness for prospect in experts.prospects), _LEAST_LEVEL)


def peak_busy_share(experts: ExpertSignals, cold_start_s: float) -> float:
    """Of the fullest shard of the average layer, as far as one can tell from balancedness."""
    members = warm(experts, cold_start_s)
    mean = sum(member.busy_share for member in members) / len(members) if members else 0.0
    return mean / max(experts.balancedness, _LEAST_LEVEL)


def imbalance_is_the_cause(experts: ExpertSignals, config: ExpertScalingConfig, cold_start_s: float) -> bool:
    """The fullest shard is over its target, and would not be if the work were level."""
    peak = peak_busy_share(experts, cold_start_s)
    mean = peak * max(experts.balancedness, _LEAST_LEVEL)
    return peak > config.target_busy_share >= mean and experts.balancedness < config.target_balancedness


def _staffed(load: float, target: float, beta: float) -> float:
    """Members for a load of so many: at their target share, or with square-root safety staffing (Halfin and Whitt,
    Operations Research 29, 1981), whichever is more."""
    return max(load / target, load + beta * math.sqrt(load))


def _corrected(load: Demand, pool: PoolSignals, num: int, name: str) -> Demand:
    """Adds what a missed target asks of the workers themselves."""
    ratio = pool.slo_ratio
    if ratio is None or ratio <= _AIM or pool.expert_wait_share >= _BLAMES_EXPERTS:
        return load
    return dataclasses.replace(
        load,
        correction=num * min(ratio / _AIM, _MOST_CORRECTION),
        correction_reason=f"p95 {name} is {ratio:.2f} of its target",
    )
