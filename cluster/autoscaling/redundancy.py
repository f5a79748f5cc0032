"""How many redundant experts the shards should hold: pure.

Replicas are worth their slots where the fullest shard is what steps wait for and the balancer can level it only with
them. Where it cannot, or where the same level is to be had with fewer, the slots are worth more as KV pages, or as a
shard less.
"""

from __future__ import annotations

from cluster.autoscaling.demand import peak_busy_share
from cluster.autoscaling.signals import ExpertSignals
from octet.autoscaler_config import ExpertScalingConfig


def wanted_redundancy(experts: ExpertSignals, config: ExpertScalingConfig, cold_start_s: float) -> tuple[int, str]:
    """Slots per layer beyond one for each expert, and why. The present number where nobody has asked the balancer."""
    now = experts.num_redundant_experts
    known = [p for p in experts.prospects if p.num_redundant_experts <= config.max_redundant_experts or
             p.num_redundant_experts == now]  # fmt: skip
    if not known:
        return now, f"the balancer was not asked what others than {now} would do"
    present = max((p for p in known if p.num_redundant_experts <= now), key=lambda p: p.num_redundant_experts,
                  default=known[0])  # fmt: skip
    peak = peak_busy_share(experts, cold_start_s)
    matters = peak > config.target_busy_share
    if matters and present.balancedness < config.target_balancedness:
        more = [p for p in known if p.num_redundant_experts > now]
        enough = [p for p in more if p.balancedness >= config.target_balancedness]
        best = enough[0] if enough else max(more, key=lambda p: p.balancedness, default=present)
        if best.balancedness >= present.balancedness + config.least_gain:
            return best.num_redundant_experts, (
                f"the fullest shard computes {peak:.2f} of its time; replicas bring balancedness from "
                f"{present.balancedness:.3f} to {best.balancedness:.3f}"
            )
    # Fewer do if what they lose is little, or if nothing waits for the shards anyway. The band between `least_gain`
    # and half of it keeps what was just added.
    mean = peak * max(experts.balancedness, 0.05)
    for prospect in known:
        if prospect.num_redundant_experts >= now:
            break
        loses = present.balancedness - prospect.balancedness
        idle = mean / prospect.balancedness <= config.target_busy_share / 2
        if loses <= config.least_gain / 2 or idle:
            why = "the shards would not be half as busy as they may be" if idle else f"they bring {loses:.3f}"
            return prospect.num_redundant_experts, f"redundancy does not pay: {why}"
    return now, f"balancedness is {experts.balancedness:.3f}, {present.balancedness:.3f} after a rebalance"
