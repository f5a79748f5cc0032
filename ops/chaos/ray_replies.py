"""Which of its own calls Ray fails by itself, in the words of `RAY_testing_rpc_failure`."""

from __future__ import annotations

from collections.abc import Mapping

_ACTOR_CALLS = "CoreWorkerService.grpc_client.PushTask"
"""Every call of an actor: Octet's whole control path."""
_MOST = 20
"""Failures in each process."""


def failures(share: float) -> Mapping[str, Mapping[str, int]]:
    """
    Args:
        share: of the calls, whose replies are lost after they were carried out. Ray counts in whole percent.
    """
    percent = max(1, round(share * 100))
    lost = {"req_failure_prob": 0, "resp_failure_prob": percent, "in_flight_failure_prob": 0}
    return {_ACTOR_CALLS: {"num_failures": _MOST, **lost}}
