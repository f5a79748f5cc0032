"""The members of the three pools as Ray actors.

The controller imports this module to start them, and has no use for torch: what needs it is imported in the members'
own processes, when they are made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import ray
import ray.util

from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from octet.ids import WorkerId

if TYPE_CHECKING:
    from model.checkpoint import LoadSnapshot
    from router.telemetry_samples import ShardSample, WorkerSample


class _AttentionActor:
    """See `AttentionWorker`, to which every method goes."""

    _role: Role

    def __init__(self, worker_id: WorkerId, plan: ServingPlan) -> None:
        from cluster.attention_worker import AttentionWorker

        self._worker = AttentionWorker(worker_id, self._role, plan, ray.util.get_node_ip_address(), node_id())

    def endpoint(self) -> Endpoint:
        return self._worker.endpoint()

    def progress(self) -> LoadSnapshot:
        return self._worker.progress()

    def load(self) -> None:
        self._worker.load()

    def connect(self, peers: Mapping[WorkerId, str], channels: Sequence[Endpoint]) -> None:
        self._worker.connect(peers, channels)

    def start(self) -> None:
        self._worker.start()

    def status(self) -> MemberStatus:
        return self._worker.status()

    def telemetry(self) -> WorkerSample | None:
        return self._worker.telemetry()

    def stop(self) -> None:
        self._worker.stop()


class PrefillWorker(_AttentionActor):
    _role: Role = "prefill"


class DecodeWorker(_AttentionActor):
    _role: Role = "decode"


class ExpertShard:
    """See `ShardWorker`, to which every method goes."""

    def __init__(self, worker_id: WorkerId, shard: int, plan: ServingPlan) -> None:
        from cluster.shard_worker import ShardWorker

        self._worker = ShardWorker(worker_id, shard, plan, ray.util.get_node_ip_address(), node_id())

    def progress(self) -> LoadSnapshot:
        return self._worker.progress()

    def load(self) -> None:
        self._worker.load()

    def connect(self, workers: Sequence[tuple[Role, Endpoint]]) -> None:
        self._worker.connect(workers)

    def telemetry(self) -> ShardSample | None:
        return self._worker.telemetry()

    def status(self) -> MemberStatus:
        return self._worker.status()

    def stop(self) -> None:
        self._worker.stop()


def node_id() -> str:
    found: str = ray.get_runtime_context().get_node_id()
    return found
