"""The members of the three pools as Ray actors.

The controller imports this module to start them, and has no use for torch: what needs it is imported in the members'
own processes, when they are made.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import ray
import ray.util

from cluster.fault_points import FaultCalls
from cluster.members import Endpoint, MemberStatus, Role
from cluster.plan import ServingPlan
from cluster.tether import Tether
from octet import faults
from octet.background import give_way
from octet.ids import Epoch, WorkerId
from router.routing import Routing

if TYPE_CHECKING:
    from cluster.workers.attention_worker import AttentionWorker
    from cluster.workers.shard_worker import ShardWorker
    from model.load_progress import LoadSnapshot
    from router.telemetry_samples import ShardSample, WorkerSample
    from router.transition import SlotFill


class _Process(Protocol):
    """What members have in common."""

    def endpoint(self) -> Endpoint: ...
    def progress(self) -> LoadSnapshot: ...
    def forget(self, peers: Sequence[WorkerId]) -> None: ...
    def status(self) -> MemberStatus: ...
    def stop(self) -> None: ...


class _MemberActor(FaultCalls):
    """A member's process, to which every method goes."""

    _worker: _Process

    def __init__(self, worker_id: WorkerId, controller: Any) -> None:
        self._lifeline, self._tether = _Lifeline(), Tether(controller, worker_id)

    def lifeline(self) -> None:
        self._lifeline.hold()

    def endpoint(self) -> Endpoint:
        return self._worker.endpoint()

    def progress(self) -> LoadSnapshot:
        return self._worker.progress()

    def forget(self, peers: Sequence[WorkerId]) -> None:
        self._worker.forget(peers)

    def status(self) -> MemberStatus:
        return self._worker.status()

    def stop(self) -> None:
        self._lifeline.let_go()
        self._worker.stop()
        give_way()


class _AttentionActor(_MemberActor):
    """See `AttentionWorker`."""

    _role: Role
    _worker: AttentionWorker

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, controller: Any) -> None:
        from cluster.workers.attention_worker import AttentionWorker

        faults.allow(plan.config.chaos.enabled)

        def report(reason: str) -> None:
            controller.lane_broke.remote(worker_id, reason)

        host = ray.util.get_node_ip_address()
        self._worker = AttentionWorker(worker_id, self._role, plan, host, node_id(), report)
        super().__init__(worker_id, controller)

    def load(self) -> None:
        self._worker.load()

    def meet(self, peers: Mapping[WorkerId, str]) -> None:
        self._worker.meet(peers)

    def link(self, shards: Sequence[WorkerId], epoch: Epoch) -> None:
        self._worker.link(shards, epoch)

    def send_to(self, peer: WorkerId, attempt: int) -> None:
        self._worker.send_to(peer, attempt)

    def receive_from(self, peer: Endpoint, attempt: int) -> None:
        self._worker.receive_from(peer, attempt)

    def give_up(self, shards: Sequence[WorkerId]) -> None:
        self._worker.give_up(shards)

    def start(self, routing: Routing) -> None:
        self._worker.start(routing)

    def adopt(self, routing: Routing) -> None:
        self._worker.adopt(routing)

    def telemetry(self) -> WorkerSample | None:
        return self._worker.telemetry()


class PrefillWorker(_AttentionActor):
    _role: Role = "prefill"


class DecodeWorker(_AttentionActor):
    _role: Role = "decode"

    def hand_over_to(self, heirs: Sequence[WorkerId]) -> None:
        self._worker.hand_over_to(heirs)


class ExpertShard(_MemberActor):
    """See `ShardWorker`."""

    _worker: ShardWorker

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, controller: Any) -> None:
        from cluster.workers.shard_worker import ShardWorker

        faults.allow(plan.config.chaos.enabled)
        self._worker = ShardWorker(worker_id, plan, ray.util.get_node_ip_address(), node_id())
        super().__init__(worker_id, controller)

    def load(self, held: Mapping[int, Sequence[int]]) -> None:
        self._worker.load(held)

    def link(self, peer: Endpoint, role: Role, linked: Sequence[WorkerId], epoch: Epoch) -> None:
        self._worker.link(peer, role, linked, epoch)

    def prepare(self, fills: Sequence[SlotFill], lenders: Mapping[WorkerId, Endpoint], attempt: str) -> int:
        return self._worker.prepare(fills, lenders, attempt)

    def lend(self, to: WorkerId, experts: Sequence[tuple[int, int]], attempt: str) -> None:
        self._worker.lend(to, experts, attempt)

    def retire(self, held: Mapping[int, Sequence[int]], given_up: str = "") -> None:
        self._worker.retire(held, given_up)

    def telemetry(self) -> ShardSample | None:
        return self._worker.telemetry()


class _Lifeline:
    """A call that ends with its process: whoever awaits it hears of the process's death as soon as Ray does."""

    def __init__(self) -> None:
        self._stopping = threading.Event()

    def hold(self) -> None:
        self._stopping.wait()

    def let_go(self) -> None:
        self._stopping.set()


def node_id() -> str:
    found: str = ray.get_runtime_context().get_node_id()
    return found
