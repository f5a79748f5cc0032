"""The controller: brings the pools up in order, watches them, and takes them down."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster.frontend_actor import ClusterStatus, FrontendActor
from cluster.members import POOLS, Endpoint, MemberStatus, Pool, Role
from cluster.plan import ServingPlan
from cluster.pool_actors import DecodeWorker, ExpertShard, PrefillWorker, node_id
from cluster.router_actor import Router
from octet.config import PoolConfig
from octet.errors import OctetError, StartupError
from octet.ids import WorkerId
from router.telemetry_window import TelemetryWindow

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

FRONTEND = WorkerId("frontend-0")
_WATCH_EVERY_S = 1.0
_ANSWER_S = 10.0
_STOP_S = 10.0
_CONCURRENCY = 4
"""Status and progress are answered while a member loads or connects."""
_TASK_EVENTS = False
"""Ray's GCS would keep an event of every call, of which the watch makes several a second."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    worker_id: WorkerId
    pool: Pool
    actor: Any


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How far a member is with its tensors."""

    worker_id: WorkerId
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float
    eta_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StartProgress:
    """Where the start is."""

    phase: str
    loading: tuple[Loading, ...] = ()


class Controller:
    """An async Ray actor. Called in this order: `start`, `drain`, `stop`; `status` and `progress` at any time."""

    def __init__(self, plan: ServingPlan) -> None:
        self._plan = plan
        self._state, self._reason, self._phase = "STARTING", "", "starting the frontend"
        self._members: list[Member] = []
        self._groups: list[PlacementGroup] = []
        self._watcher: asyncio.Task[None] | None = None
        self._frontend: Any = None
        self._router: Any = None

    async def start(self) -> int:
        """Bring everything up. Returns: the gRPC port.

        Raises: StartupError, or the typed error of the member that refused.
        """
        timeout_s = self._plan.config.ray.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await self._start()
        except TimeoutError:
            raise StartupError(f"the cluster was not up within {timeout_s} s; it was {self._phase}") from None

    async def _start(self) -> int:
        plan = self._plan
        controller = ray.get_runtime_context().current_actor
        self._frontend = self._control_actor(FrontendActor, FRONTEND, FRONTEND, plan, controller)
        self._router = self._control_actor(Router, "router", plan)
        listening: tuple[str, int] = await _answer(self._frontend.listen.remote(), FRONTEND)
        frontend_mailbox, port = listening
        self._phase = "waiting for Ray to place the pools"
        for pool in POOLS:
            await self._place(pool)
        self._phase = "starting the pools' processes"
        endpoints = await self._endpoints()
        self._phase = "loading weights"
        await self._all([member.actor.load.remote() for member in self._members], self._members)
        self._phase = "connecting lanes"
        await self._connect({FRONTEND: frontend_mailbox}, endpoints)
        workers = [*self._pool("prefill"), *self._pool("decode")]
        await self._all([member.actor.start.remote() for member in workers], workers)
        await self._router.watch.remote({member.worker_id: member.actor for member in self._members})
        mailboxes = {pool: {e.worker_id: e.mailbox for e in endpoints[pool]} for pool in ("prefill", "decode")}
        await self._frontend.serve.remote(mailboxes["prefill"], mailboxes["decode"])
        self._state, self._phase = "READY", "ready"
        self._watcher = asyncio.get_running_loop().create_task(self._watch())
        return port

    async def progress(self) -> StartProgress:
        if self._phase != "loading weights":
            return StartProgress(phase=self._phase)
        snapshots = await asyncio.gather(*(_answer(m.actor.progress.remote(), m.worker_id) for m in self._members))
        return StartProgress(
            phase=self._phase,
            loading=tuple(
                Loading(
                    worker_id=member.worker_id,
                    tensors_done=snapshot.tensors_done,
                    tensors_total=snapshot.tensors_total,
                    bytes_done=snapshot.bytes_done,
                    bytes_total=snapshot.bytes_total,
                    rate_bytes_s=snapshot.rate_bytes_s,
                    eta_s=snapshot.eta_s,
                )
                for member, snapshot in zip(self._members, snapshots, strict=True)
            ),
        )

    async def state(self) -> tuple[str, str]:
        """State and, where it is not READY, the reason."""
        return self._state, self._reason

    async def status(self, window_s: float | None = None) -> ClusterStatus:
        """Of all members; telemetry of the last `window_s` seconds, or of all that there is."""
        members: dict[str, list[MemberStatus]] = {pool: [] for pool in POOLS}
        answers = await asyncio.gather(*(self._member_status(member) for member in self._members))
        for member, status in zip(self._members, answers, strict=True):
            members[member.pool].append(status)
        telemetry = await self._telemetry(window_s)
        return ClusterStatus(state=self._state, reason=self._reason, members=members, telemetry=telemetry)

    async def _telemetry(self, window_s: float | None) -> TelemetryWindow | None:
        """Up to now; None where the router service does not answer, of which the watch takes care."""
        if self._router is None:
            return None
        try:
            answer = self._router.telemetry.remote(window_s, fresh=True)
            window: TelemetryWindow = await asyncio.wait_for(answer, _ANSWER_S)
        except (TimeoutError, ray.exceptions.RayError) as error:
            _log.warning("no telemetry: %s", error)
            return None
        return window

    async def drain(self) -> None:
        """Let live requests end, admit no more."""
        if self._state == "READY":
            self._state, self._reason = "DRAINING", "a stop was asked for"
            await self._frontend.drain.remote(self._plan.config.frontend.drain_s)

    async def stop(self) -> None:
        """Take everything down, whatever state it is in."""
        if self._watcher is not None:
            self._watcher.cancel()
        services = [service for service in (self._router, self._frontend) if service is not None]
        actors: list[Any] = [*services, *(m.actor for m in self._members)]
        stops = [asyncio.wait_for(actor.stop.remote(), _STOP_S) for actor in actors]
        # Whoever does not stop in time is killed with the rest.
        await asyncio.gather(*stops, return_exceptions=True)
        for actor in actors:
            ray.kill(actor)
        for group in self._groups:
            remove_placement_group(group)

    def _control_actor(self, cls: type, name: str, *args: Any) -> Any:
        """On this node, where `octet serve` runs, so that the address it prints is the right one."""
        here = NodeAffinitySchedulingStrategy(node_id(), soft=False)
        namespace = self._plan.config.ray.namespace
        options = {
            "name": name,
            "namespace": namespace,
            "num_cpus": 0,
            "scheduling_strategy": here,
            "max_concurrency": 1000,
            "enable_task_events": _TASK_EVENTS,
        }
        return ray.remote(cls).options(**options).remote(*args)

    def _pool(self, pool: Pool) -> list[Member]:
        return [member for member in self._members if member.pool == pool]

    async def _place(self, pool: Pool) -> None:
        """Reserve the pool's bundles, and start one actor in each."""
        config: PoolConfig = getattr(self._plan.config.pools, pool)
        bundle = {"CPU": config.num_cpus, "GPU": config.num_gpus, **config.resources}
        bundle = {name: amount for name, amount in bundle.items() if amount > 0}
        # A bundle may not be empty; this much of a CPU is Ray's smallest share.
        group = placement_group([bundle or {"CPU": 0.0001}] * config.size, strategy=config.strategy)
        self._groups.append(group)
        self._phase = f"waiting for Ray to place {config.size} × {bundle} for the {pool} pool"
        await group.ready()
        for index in range(config.size):
            worker_id = WorkerId(f"{pool}-{index}")
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            options = {
                "name": worker_id,
                "namespace": self._plan.config.ray.namespace,
                "num_cpus": config.num_cpus,
                "num_gpus": config.num_gpus,
                "resources": config.resources,
                "scheduling_strategy": strategy,
                "max_concurrency": _CONCURRENCY,
                "enable_task_events": _TASK_EVENTS,
            }
            args = (worker_id, index, self._plan) if pool == "experts" else (worker_id, self._plan)
            actor: Any = ray.remote(_CLASSES[pool]).options(**options).remote(*args)
            self._members.append(Member(worker_id=worker_id, pool=pool, actor=actor))

    async def _endpoints(self) -> dict[Role, list[Endpoint]]:
        shards = self._pool("experts")
        await self._all([member.actor.status.remote() for member in shards], shards)
        roles: tuple[Role, ...] = ("prefill", "decode")
        return {
            role: await self._all([m.actor.endpoint.remote() for m in self._pool(role)], self._pool(role))
            for role in roles
        }

    async def _connect(self, frontends: dict[WorkerId, str], endpoints: dict[Role, list[Endpoint]]) -> None:
        """Every member joins its groups at the same time, all in the same order."""
        peers = frontends | {e.worker_id: e.mailbox for role in endpoints.values() for e in role}
        workers = [(role, endpoint) for role, of_role in endpoints.items() for endpoint in of_role]
        calls = []
        for member in self._members:
            if member.pool == "experts":
                calls.append(member.actor.connect.remote(workers))
            else:
                others = endpoints["decode" if member.pool == "prefill" else "prefill"]
                calls.append(member.actor.connect.remote(peers, others))
        await self._all(calls, self._members)

    async def _all(self, calls: Sequence[Any], members: Sequence[Member]) -> list[Any]:
        """Wait for every call; the first failure counts."""
        named = [_answer(call, member.worker_id) for call, member in zip(calls, members, strict=True)]
        return await asyncio.gather(*named)

    async def _watch(self) -> None:
        """Observe every process; one that is lost or has failed ends the service, and every live request hears it."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            for name, actor in ((FRONTEND, self._frontend), ("router", self._router)):
                if self._state == "READY" and await _is_gone(actor):
                    self._state, self._reason = "FAILED", f"{name}: its process is gone"
                    _log.error("the cluster has failed: %s", self._reason)
                    if actor is not self._frontend:
                        await self._frontend.fail.remote(self._reason)
            for status in await asyncio.gather(*(self._member_status(member) for member in self._members)):
                if status.state == "FAILED" and self._state == "READY":
                    self._state, self._reason = "FAILED", f"{status.worker_id}: {status.reason}"
                    _log.error("the cluster has failed: %s", self._reason)
                    await self._frontend.fail.remote(self._reason)

    async def _member_status(self, member: Member) -> MemberStatus:
        try:
            status: MemberStatus = await asyncio.wait_for(member.actor.status.remote(), _ANSWER_S)
        except ray.exceptions.RayActorError as error:
            return _unknown(member, "FAILED", f"its process is gone ({type(error).__name__})")
        except TimeoutError:
            return _unknown(member, "SILENT", f"no answer within {_ANSWER_S} s")
        return status


_CLASSES: dict[Pool, type] = {"prefill": PrefillWorker, "decode": DecodeWorker, "experts": ExpertShard}


async def _is_gone(actor: Any) -> bool:
    """Whether the process is lost; one that is only slow is not."""
    try:
        await asyncio.wait_for(actor.ping.remote(), _ANSWER_S)
    except ray.exceptions.RayActorError:
        return True
    except TimeoutError:
        return False
    return False


def _unknown(member: Member, state: str, reason: str) -> MemberStatus:
    return MemberStatus(worker_id=member.worker_id, node_id="", pid=0, state=state, reason=reason)


async def _answer(call: Awaitable[_T], worker_id: WorkerId) -> _T:
    """Await an actor call; its own typed errors come through, anything else says whose it was.

    Raises: OctetError.
    """
    try:
        return await call
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OctetError):
            raise cause from None
        raise StartupError(f"{worker_id}: {error}") from error
    except ray.exceptions.RayActorError as error:
        raise StartupError(f"{worker_id}: its process is gone: {error}") from error
