"""Makers of signals for the tests of the autoscaler."""

from __future__ import annotations

from cluster.autoscaling.autoscaler import Decision, Fleet, PoolDecision, State, decide
from cluster.autoscaling.signals import ExpertSignals, MemberSample, PoolSignals, Prospect, Signals
from octet.autoscaler_config import AutoscalerConfig
from octet.ids import WorkerId

FLEET = Fleet(gpus_per_member={"prefill": 1, "decode": 1, "experts": 1}, max_batch=64)
OLD_S = 1e6


def member(
    number: int = 0,
    busy: float = 0.5,
    tokens_per_s: float = 500.0,
    kv: float = 0.0,
    ongoing: float = 0.0,
    waiting: float = 0.0,
    age_s: float = OLD_S,
) -> MemberSample:
    return MemberSample(
        worker_id=WorkerId(f"member-{number}"),
        age_s=age_s,
        busy_share=busy,
        tokens_per_s=tokens_per_s,
        kv_occupancy=kv,
        ongoing=ongoing,
        waiting=waiting,
    )


def pool(*members: MemberSample, starting: int = 0, slo: float | None = None, wait: float = 0.0) -> PoolSignals:
    return PoolSignals(members=members, num_starting=starting, slo_ratio=slo, expert_wait_share=wait)


def experts(
    *members: MemberSample,
    starting: int = 0,
    level: float = 1.0,
    of_decode: float = 0.0,
    redundant: int = 0,
    prospects: tuple[tuple[int, float], ...] = (),
    fit: int = 32,
) -> ExpertSignals:
    return ExpertSignals(
        members=members,
        num_starting=starting,
        balancedness=level,
        decode_share=of_decode,
        num_redundant_experts=redundant,
        slots_that_fit=fit,
        num_experts=32,
        prospects=tuple(Prospect(num_redundant_experts=number, balancedness=b) for number, b in prospects),
    )


def signals(
    prefill: PoolSignals | None = None,
    decode: PoolSignals | None = None,
    shards: ExpertSignals | None = None,
    arriving: float = 350.0,
    queued: float = 0.0,
    requests_waiting: int = 0,
) -> Signals:
    """At rest: every pool of one member is just as busy as it is meant to be."""
    return Signals(
        period_s=30.0,
        queued_prompt_tokens=queued,
        arriving_prompt_tokens_per_s=arriving,
        requests_waiting=requests_waiting,
        prefill=prefill or pool(member(busy=0.35, tokens_per_s=350)),
        decode=decode or pool(member(kv=0.8, ongoing=8)),
        experts=shards or experts(member(busy=0.7)),
    )


def scaling(**sections: object) -> AutoscalerConfig:
    """A config without delays, but for what is given."""
    prompt: dict[str, object] = {"upscale_delay_s": 0, "downscale_delay_s": 0}
    pools = {name: prompt | sections.pop(name, {}) for name in ("prefill", "decode", "experts")}  # type: ignore[operator]
    return AutoscalerConfig.model_validate({"forecast_horizon_s": 0, "reversal_cooldown_s": 0, **pools, **sections})


def of(decision: Decision, name: str) -> PoolDecision:
    return next(one for one in decision.pools if one.pool == name)


def once(given_signals: Signals, config: AutoscalerConfig) -> Decision:
    return decide(0.0, given_signals, config, FLEET, State())[0]
