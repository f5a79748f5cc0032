"""A frontend as a Ray actor: the gRPC server, the frontend behind it, and the status page."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import time
from collections.abc import Collection, Mapping
from typing import Any

import ray.util

from cluster.frontend import Frontend
from cluster.generation_service import GenerationService
from cluster.grpc_service import ClusterService, GrpcServer
from cluster.members import POOLS, MemberStatus
from cluster.plan import ServingPlan
from cluster.status_telemetry import add_telemetry
from model.tokenizer import Tokenizer
from octet.errors import UnavailableError
from octet.ids import WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import WorkerLoad
from octet.v1 import octet_pb2 as pb
from router.telemetry_window import TelemetryWindow

_STATUS_S = 10.0
_NO_LOAD = WorkerLoad(kv_pages_total=0, kv_pages_free=0, running=0, waiting=0, tokens=0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What the controller knows."""

    state: str
    reason: str
    members: Mapping[str, list[MemberStatus]]
    telemetry: TelemetryWindow | None


class FrontendActor:
    """Called in this order: `listen`, `serve`, `drain`, `stop`; `set_workers` whenever they change after `serve`."""

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, controller: Any) -> None:
        self._worker_id, self._plan, self._controller = worker_id, plan, controller
        self._started_s = time.monotonic()

    async def listen(self) -> tuple[str, int]:
        """Open the gRPC port, NOT_SERVING. Returns: the frontend's mailbox address and the port.

        Raises: CheckpointError for a broken tokenizer, ConfigError for a port that is taken.
        """
        plan = self._plan
        model_dir = pathlib.Path(plan.model_dir)
        tokenizer = await asyncio.to_thread(Tokenizer.open, model_dir)
        self._frontend = Frontend(self._worker_id, plan, tokenizer, AsyncMailbox(ray.util.get_node_ip_address()))
        generation = GenerationService(
            self._frontend, model_dir.name, plan.census.total_parameters, plan.config.frontend.max_stall_s
        )
        self._server = GrpcServer(plan.config.frontend, generation, ClusterService(self._status))
        return self._frontend.address, await self._server.start()

    async def serve(self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str]) -> None:
        self._frontend.serve(prefill, decode)
        await self._server.set_serving(True)

    async def set_workers(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """See `Frontend.set_workers`."""
        self._frontend.set_workers(prefill, decode, draining)

    async def ping(self) -> None:
        """Answered as long as the frontend's event loop runs."""

    async def fail(self, reason: str) -> None:
        await self._server.set_serving(False)
        self._frontend.fail(reason)

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing more, and wait for what is live."""
        await self._server.set_serving(False)
        self._frontend.stop_admitting("the cluster is draining")
        await self._frontend.drain(timeout_s)

    async def stop(self) -> None:
        await self._server.stop(grace_s=2.0)
        self._frontend.close()

    async def _status(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse:
        try:
            window_s = request.window_s or None
            status: ClusterStatus = await asyncio.wait_for(self._controller.status.remote(window_s), _STATUS_S)
        except (TimeoutError, ray.exceptions.RayError) as error:
            raise UnavailableError(f"the controller did not answer within {_STATUS_S} s: {error}") from error
        totals = self._frontend.totals
        answer = pb.GetStatusResponse(
            state=status.state,
            reason=status.reason,
            pools=[pb.Pool(name=name, members=map(_member, status.members.get(name, []))) for name in POOLS],
            epoch=self._plan.epoch,
            placement_version=self._plan.placement.version,
            live_requests=self._frontend.num_live,
            tokens_served=totals.tokens,
            requests_finished=totals.finished,
            requests_failed=totals.failed,
            requests_cancelled=totals.cancelled,
            requests_refused=totals.refused,
            uptime_s=time.monotonic() - self._started_s,
        )
        if status.telemetry is not None:
            add_telemetry(answer, status.telemetry)
        return answer


def _member(status: MemberStatus) -> pb.Member:
    load = status.load or _NO_LOAD
    return pb.Member(
        worker_id=status.worker_id,
        node_id=status.node_id,
        pid=status.pid,
        state=status.state,
        kv_pages_total=load.kv_pages_total,
        kv_pages_free=load.kv_pages_free,
        running=load.running,
        waiting=load.waiting,
        tokens=load.tokens or status.num_rows,
        num_slots=status.num_slots,
        resident_bytes=status.resident_bytes,
        preemptions=load.preemptions,
        leases=load.leases,
        cached_tokens=load.cached_tokens,
        drafted_tokens=load.drafted_tokens,
        accepted_tokens=load.accepted_tokens,
    )
