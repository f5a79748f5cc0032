"""The autoscaler's decisions as the status page tells them."""

from __future__ import annotations

from cluster.autoscaling.decision_log import DecisionLog, Logged
from octet.v1 import octet_pb2 as pb


def add_decisions(status: pb.GetStatusResponse, log: DecisionLog, now_s: float) -> None:
    """
    Args:
        now_s: on the clock of the decisions.
    """
    status.autoscaler_enabled = True
    status.decisions.extend(_decision(one, now_s) for one in log.actions)
    status.latest_decisions.extend(_decision(one, now_s) for one in log.latest)


def _decision(one: Logged, now_s: float) -> pb.ScalingDecision:
    return pb.ScalingDecision(
        age_s=now_s - one.at_s,
        pool=one.pool,
        current=one.current,
        wanted=one.wanted,
        target=one.target,
        reason=one.reason,
        outcome=one.outcome,
    )
