"""Which of its own calls Ray fails by itself, in the words of `RAY_testing_rpc_failure`."""

from __future__ import annotations

from collections.abc import Mapping

_ACTOR_CALLS = "CoreWorkerService.grpc_client.PushTask"
"""Every call of an actor: Octet's whole control path."""
_CONTROL = {
    "ray::rpc::ActorInfoGcsService": (
        "RegisterActor",
        "CreateActor",
        "GetActorInfo",
        "GetNamedActorInfo",
        "KillActorViaGcs",
    ),
    "ray::rpc::ControlPlanePubSubGcsService": ("GcsSubscriberPoll", "GcsSubscriberCommandBatch"),
    "ray::rpc::InternalKVGcsService": (
        "InternalKVGet",
        "InternalKVMultiGet",
        "InternalKVPut",
        "InternalKVDel",
        "InternalKVExists",
        "InternalKVKeys",
    ),
    "ray::rpc::PlacementGroupInfoGcsService": (
        "CreatePlacementGroup",
        "RemovePlacementGroup",
        "GetPlacementGroup",
        "GetAllPlacementGroup",
        "WaitPlacementGroupUntilReady",
    ),
    "NodeManagerService": (
        "RequestWorkerLease",
        "ReturnWorkerLease",
        "CancelWorkerLease",
        "PrepareBundleResources",
        "CommitBundleResources",
        "ReleaseUnusedBundles",
        "RemovePlacementGroupBundles",
    ),
}
"""To the GCS and to raylets, for an actor, a key or a place. Ray makes such a call again by itself."""
_MOST = 20
"""Failures in each process, of each call."""


def failures(share: float, control_share: float = 0.0) -> Mapping[str, Mapping[str, int]]:
    """
    Args:
        share: of the calls of actors, whose replies are lost after they were carried out. Ray counts in whole percent.
        control_share: of the calls to the GCS and to raylets; as many are lost before they arrive, while they are
            carried out, and on their way back.
    """
    failing = {}
    if share:
        failing[_ACTOR_CALLS] = _failing(_percent(share), before=0)
    if control_share:
        percent = _percent(control_share)
        calls = (f"{service}.grpc_client.{method}" for service, methods in _CONTROL.items() for method in methods)
        failing |= {call: _failing(percent, before=percent) for call in calls}
    return failing


def _failing(reply_percent: int, before: int) -> Mapping[str, int]:
    return {
        "num_failures": _MOST,
        "req_failure_prob": before,
        "resp_failure_prob": reply_percent,
        "in_flight_failure_prob": before,
    }


def _percent(share: float) -> int:
    return max(1, round(share * 100))
