"""What is asked of the cluster as a whole, by way of the controller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any, TypeVar

from ray.exceptions import ActorUnavailableError

from cluster.actors import call
from cluster.api.cluster_status import ClusterStatus
from cluster.api.status_decisions import add_decisions
from cluster.api.status_requests import request_histograms
from cluster.api.status_telemetry import add_telemetry
from cluster.change_record import ChangeRecord
from cluster.frontend.frontend import Frontend
from cluster.frontend.validation import status_window_s, wanted_sizes
from cluster.members import POOLS, MemberStatus
from octet.errors import UnavailableError
from octet.messages import WorkerLoad
from octet.v1 import octet_pb2 as pb
from router.proposal import Proposal

_T = TypeVar("_T")

_ANSWER_S = 10.0
_POLL_S = 0.05
_CHANGE_S = 600.0
"""Of a change, whose parts have deadlines of their own."""
_NO_LOAD = WorkerLoad(kv_pages_total=0, kv_pages_free=0, running=0, waiting=0, tokens=0)


class ControllerOperations:
    """Answers the Cluster service of a frontend."""

    def __init__(self, controller: Any, frontend: Frontend) -> None:
        self._controller, self._frontend = controller, frontend
        self._started_s = time.monotonic()

    async def status(self, request: pb.GetStatusRequest) -> pb.GetStatusResponse:
        """Raises: RequestError, or UnavailableError if the controller does not answer."""
        status = await self._status(status_window_s(request))
        totals = self._frontend.totals
        members = [member for pool in status.members.values() for member in pool]
        answer = pb.GetStatusResponse(
            state=status.state,
            reason=status.reason,
            pools=[pb.Pool(name=name, members=map(_member, status.members.get(name, []))) for name in POOLS],
            epoch=status.epoch,
            placement_version=status.placement_version,
            live_requests=self._frontend.num_live,
            tokens_served=totals.tokens,
            requests_finished=totals.finished,
            requests_failed=totals.failed,
            requests_cancelled=totals.cancelled,
            requests_refused=totals.refused,
            strangers_refused=self._frontend.num_strangers + sum(member.refused for member in members),
            messages_dropped=self._frontend.num_dropped + sum(member.dropped for member in members),
            uptime_s=time.monotonic() - self._started_s,
            changes=map(_change, status.changes),
            change_under_way=status.under_way,
            waiting_for=status.waiting_for,
            request_histograms=request_histograms(self._frontend.histograms),
        )
        if status.telemetry is not None:
            add_telemetry(answer, status.telemetry)
        if status.decisions is not None:
            add_decisions(answer, status.decisions, status.decisions_s)
        return answer

    async def rebalance(self, request: pb.RebalanceRequest) -> pb.RebalanceResponse:
        """Raises: OctetError."""
        proposal: Proposal = await _change_by(self._controller.rebalance.remote(request.dry_run))
        status = await self._status()
        fills = proposal.transition.fills
        return pb.RebalanceResponse(
            moves=[
                pb.Move(layer=fill.layer, expert=fill.expert, to=fill.shard, **{"from": fill.source or ""})
                for fill in fills
            ],
            bytes=proposal.num_bytes,
            balancedness_before=proposal.balancedness[0],
            balancedness_after=proposal.balancedness[1],
            relative_gain=proposal.relative_gain,
            reason=proposal.transition.reason,
            placement_version=status.placement_version,
        )

    async def scale(self, request: pb.ScaleRequest) -> pb.ScaleResponse:
        """Raises: OctetError."""
        sizes = wanted_sizes(request)
        await _change_by(self._controller.scale.remote(sizes))
        status = await self._status()
        return pb.ScaleResponse(
            sizes=[pb.PoolSize(pool=pool, size=size) for pool, size in status.sizes.items()],
            epoch=status.epoch,
            placement_version=status.placement_version,
        )

    async def _status(self, window_s: float | None = None) -> ClusterStatus:
        """Asked for again where the controller's process is replaced. Raises: UnavailableError."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                while True:
                    try:
                        status: ClusterStatus = await call("the controller", self._controller.status.remote(window_s))
                        return status
                    except UnavailableError as error:
                        if not isinstance(error.__cause__, ActorUnavailableError):
                            raise
                        await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise UnavailableError(f"the controller: no answer within {_ANSWER_S} s") from None


async def _change_by(asked: Awaitable[_T]) -> _T:
    """A change is not asked for twice behind its caller's back. Raises: OctetError."""
    try:
        return await call("the controller", asked, _CHANGE_S)
    except UnavailableError as error:
        if not isinstance(error.__cause__, ActorUnavailableError):
            raise
        raise UnavailableError(
            "the controller was lost and replaced during the change, which was brought to its end or undone: "
            "look at the status, and ask for it again where it is still wanted"
        ) from error


def _change(record: ChangeRecord) -> pb.Change:
    return pb.Change(
        at_s=record.at_s,
        duration_s=record.duration_s,
        kind=record.kind,
        reason=record.reason,
        outcome=record.outcome,
        succeeded=record.succeeded,
    )


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
        num_held=status.num_held,
        resident_bytes=status.resident_bytes,
        preemptions=load.preemptions,
        leases=load.leases,
        cached_tokens=load.cached_tokens,
        drafted_tokens=load.drafted_tokens,
        accepted_tokens=load.accepted_tokens,
        refused=status.refused,
        dropped=status.dropped,
    )
