"""The controller: brings the cluster up, watches it, decides on its changes, and takes it down."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import ray

from cluster.actors import call
from cluster.api.cluster_status import ClusterStatus
from cluster.autoscaling.decision_log import DecisionLog
from cluster.control.changes import Changes
from cluster.control.controller_journal import unpack_journal
from cluster.control.estate import Estate
from cluster.control.keeper import Keeper
from cluster.control.member_status import member_status
from cluster.control.membership import Membership
from cluster.control.mending import Mending
from cluster.control.pool_scaler import PoolScaler
from cluster.control.pools import Member, Pools
from cluster.control.recovery import Recovery
from cluster.control.services import FRONTEND, Services, is_gone
from cluster.control.slow_members import WINDOW_S, SlowMembers
from cluster.control.start_progress import LOADING, StartProgress, start_progress
from cluster.control.watch import Findings, Watch
from cluster.fault_points import FaultCalls
from cluster.members import POOLS, MemberStatus, Pool
from cluster.plan import ServingPlan
from cluster.workers.pool_actors import node_id
from octet import faults
from octet.errors import OctetError, StartupError
from octet.ids import WorkerId
from router.proposal import Proposal
from router.telemetry_window import TelemetryWindow

_log = logging.getLogger(__name__)

_ANSWER_S = 10.0
_STOP_S = 10.0
_PRESENCE_S = 20.0


class Controller(FaultCalls):
    """An async Ray actor. Called in this order: `start`, `drain`, `stop`; everything else in between.

    States: STARTING, READY, DEGRADED while a pool lacks members that were lost, DRAINING, FAILED.
    """

    def __init__(self, plan: ServingPlan) -> None:
        faults.allow(plan.config.chaos.enabled)
        self._plan = plan
        self._state, self._reason, self._phase = "STARTING", "", "starting the frontend"
        self._sizes: dict[Pool, int] = {pool: getattr(plan.config.pools, pool).size for pool in POOLS}
        self._starting: list[Member] = []
        self._pools: Pools | None = None
        self._membership: Membership | None = None
        self._changes: Changes | None = None
        self._watch: Watch | None = None
        self._recovery: Recovery | None = None
        self._slow: SlowMembers | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._decisions: DecisionLog | None = None
        self._services: Services | None = None
        self._keeper = Keeper(plan.config.ray.namespace)
        self._estate: Estate | None = None
        self._there = asyncio.Event()
        if ray.get_runtime_context().was_current_actor_reconstructed:
            # Its process was lost; this one takes its place.
            self._phase = "taking the place of a controller that was lost"
            self._spawn(self._take_over())
        else:
            self._there.set()

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
        # What a cluster of this name has left, whose controller could not end it.
        self._keeper.sweep()
        self._keeper.erase()
        self._services = Services(self._plan, ray.get_runtime_context().current_actor)
        estate = self._assemble(self._services, {FRONTEND: await self._services.listen()})
        pools, membership = estate.pools, estate.membership
        for pool in POOLS:
            self._phase = f"waiting for Ray to place {pools.wanted(pool, self._sizes[pool])}"
            self._starting += await pools.start(pool, self._sizes[pool], together=self._together(pool))
        self._phase = "starting the pools' processes"
        await membership.reach(self._starting)
        self._phase = LOADING
        await membership.load(self._starting, self._plan.routing)
        self._phase = "connecting lanes"
        await membership.found(self._starting)
        await estate.changes.announcements.tell_router()
        mailboxes = membership.mailboxes
        await self._services.serve(mailboxes("prefill"), mailboxes("decode"), estate.changes.announcements.draining)
        self._starting = []
        self._go_on(estate)
        return self._services.port

    async def _take_over(self) -> None:
        """Go on where another controller's process has ended. Its members serve all the while."""
        try:
            await self._resume()
        except Exception as error:
            _log.exception("the controller does not go on")
            self._state, self._reason = "FAILED", f"the controller was lost, and the next one cannot go on: {error}"
        finally:
            self._there.set()

    async def _resume(self) -> None:
        """Raises: OctetError if nothing was served yet, or the journal is broken."""
        packed = self._keeper.read()
        if packed is None:
            self._keeper.sweep()
            raise StartupError("its process was lost while the cluster started")
        journal = unpack_journal(packed)
        services = Services(self._plan, ray.get_runtime_context().current_actor, journal.port)
        self._services = services
        self._sizes |= journal.sizes
        estate = self._assemble(services, dict(journal.frontends))
        gone = estate.take_over(journal)
        self._go_on(estate)
        if self._decisions is not None:
            self._decisions.take_over(journal.actions, journal.latest)
        assert self._watch is not None
        self._watch.set(estate.membership.all())
        self._spawn(self._settle(estate, journal.under_way, gone))

    async def _settle(self, estate: Estate, under_way: str, gone: set[WorkerId]) -> None:
        """Before any other change, but beside whatever is asked."""
        async with estate.changes.log.change("recovery", "the controller: its process is gone") as record:
            await estate.changes.settle(await estate.services.mailbox(), under_way, gone, record)
            record.append("another one goes on")
        if self._state == "READY" and self._short():
            assert self._recovery is not None
            self._state, self._reason = "DEGRADED", "members are missing"
            self._spawn(self._recover(self._recovery))

    def _assemble(self, services: Services, frontends: dict[WorkerId, str]) -> Estate:
        """Everything that decides, without anything to decide on."""
        plan = self._plan
        self._pools = Pools(plan, ray.get_runtime_context().current_actor)
        self._membership = Membership(plan, frontends, self._on_lost)
        mending = Mending(self._membership, self._ready, lambda: self._lost, self._spawn)
        self._watch = Watch(
            plan.config.health,
            2 * plan.config.lane.recovery_s,
            Findings(lost=self._on_lost, stranded=mending.stranded, severed=mending.severed),
            self._membership.endpoint,
            node_id(),
        )
        self._changes = Changes(plan, self._pools, self._membership, services, self._watch.set)
        self._recovery = Recovery(self._changes, self._short)
        self._estate = Estate(
            keeper=self._keeper,
            pools=self._pools,
            membership=self._membership,
            changes=self._changes,
            services=services,
            sizes=self._sizes,
            decisions=lambda: self._decisions,
        )
        return self._estate

    def _go_on(self, estate: Estate) -> None:
        """All members serve: look after them from here on."""
        plan, changes, services = self._plan, estate.changes, estate.services
        assert self._watch is not None
        self._state, self._phase = "READY", "ready"
        estate.keep()
        self._spawn(self._look_after_services(services, changes))
        self._spawn(self._balance())
        self._slow = SlowMembers(
            plan.config.health,
            estate.membership,
            changes.moves,
            self._watch.late,
            lambda: self._telemetry(WINDOW_S, fresh=False),
            self._on_lost,
        )
        self._spawn(self._slow.run())
        self._spawn(changes.standby.fill())
        if plan.config.autoscaler.enabled:
            scaler = PoolScaler(plan, estate.membership, changes, services, self._scale_one)
            self._decisions = scaler.loop.log
            self._spawn(scaler.loop.run())

    async def progress(self) -> StartProgress:
        """Where the start is."""
        return await start_progress(self._phase, self._starting)

    async def serving(self) -> tuple[ServingPlan, int]:
        """What is served, and the gRPC port. Raises: StartupError before everything serves."""
        await self._there.wait()
        self._ready()
        assert self._services is not None
        return self._plan, self._services.port

    async def presence(self, name: str = "") -> bool:
        """Answered late, and asked for again: a call that is open ends with this process, of which its callers want to
        hear. Those of callers that are gone must come to an end, too.

        Args:
            name: of the member that asks.

        Returns: whether it may go on. One that was ended and still asks has not heard of it.
        """
        if self._ended(name):
            return False
        await asyncio.sleep(_PRESENCE_S)
        return not self._ended(name)

    def _ended(self, name: str) -> bool:
        return self._pools is not None and name in self._pools.ended

    async def state(self) -> tuple[str, str]:
        """State and, where it is not READY, the reason."""
        await self._there.wait()
        return self._state, self._reason

    async def status(self, window_s: float | None = None) -> ClusterStatus:
        """Of all members; telemetry of the last `window_s` seconds, or of all that there is."""
        await self._there.wait()
        members: dict[str, list[MemberStatus]] = {pool: [] for pool in POOLS}
        known = self._membership.all() if self._membership is not None else []
        waiting = self._changes.standby.all() if self._changes is not None else []
        parted = self._membership.unless_parted if self._membership is not None else None
        asked = asyncio.gather(*(member_status(member, parted) for member in (*known, *waiting)))
        # At the same time: each may take as long as it has.
        answers, telemetry = await asyncio.gather(asked, self._telemetry(window_s))
        for number, (member, status) in enumerate(zip((*known, *waiting), answers, strict=True)):
            shown = status
            if number >= len(known) and status.state not in ("FAILED", "SILENT"):
                shown = dataclasses.replace(status, state="STANDBY")
            if self._slow is not None and (why := self._slow.slow.get(member.worker_id)):
                shown = dataclasses.replace(shown, state="SLOW", reason=why)
            members[member.pool].append(shown)
        routing = self._membership.routing if self._membership is not None else self._plan.routing
        reason = self._reason
        if self._state == "READY" and not known:
            reason = "no member is there, as nothing is asked for: the next request brings them back"
        return ClusterStatus(
            state=self._state,
            reason=reason,
            members=members,
            sizes={pool: sum(member.pool == pool for member in known) for pool in POOLS},
            telemetry=telemetry,
            epoch=routing.epoch,
            placement_version=routing.placement.version,
            changes=self._changes.log.records if self._changes is not None else (),
            under_way=self._changes.log.under_way if self._changes is not None else "",
            waiting_for=self._pools.waiting_for if self._pools is not None else "",
            decisions=self._decisions,
            decisions_s=asyncio.get_running_loop().time(),
        )

    async def rebalance(self, dry_run: bool) -> Proposal:
        """Move experts after the loads of the telemetry window, now. Raises: OctetError."""
        await self._there.wait()
        return await self._ready().moves.rebalance(dry_run=dry_run, reason="it was asked for")

    async def scale(self, sizes: Mapping[Pool, int], reason: str = "it was asked for") -> None:
        """Bring pools to these sizes, one after the other. Raises: OctetError."""
        await self._there.wait()
        changes = self._ready()
        for pool, size in sizes.items():
            before = self._sizes[pool]
            # What is lost is made up for to the smaller of the two until it is done.
            self._sizes[pool] = min(before, size)
            try:
                await changes.sizes.scale(pool, size, reason)
            except BaseException:
                if self._sizes[pool] == min(before, size):
                    self._sizes[pool] = before
                raise
            else:
                self._sizes[pool] = size
            finally:
                self._note()
        self._spawn(changes.standby.fill())

    def _note(self) -> None:
        if self._estate is not None:
            self._estate.note()

    async def _scale_one(self, pool: Pool, size: int, reason: str) -> None:
        await self.scale({pool: size}, reason)

    async def lane_broke(self, worker_id: WorkerId, reason: str) -> None:
        """An attention worker's lane has broken: the shard behind it is looked at now and not at the next turn."""
        _log.warning("%s: its lane has broken: %s", worker_id, reason)
        if self._watch is not None:
            self._watch.look_at("experts")

    async def drain(self) -> None:
        """Let live requests end, admit no more."""
        await self._there.wait()
        if self._state in ("READY", "DEGRADED"):
            assert self._services is not None
            self._state, self._reason = "DRAINING", "a stop was asked for"
            await self._services.frontend.drain.remote(self._plan.config.frontend.drain_s)

    async def stop(self) -> None:
        """Take everything down, whatever state it is in."""
        await self._there.wait()
        for task in self._tasks:
            task.cancel()
        if self._watch is not None:
            self._watch.close()
        members = self._membership.all() if self._membership is not None else []
        members = [*members, *(member for member in self._starting if member not in members)]
        if self._changes is not None:
            members += self._changes.standby.all()
        services = self._services.all() if self._services is not None else []
        actors: list[Any] = [*services, *(member.actor for member in members)]
        stops = [asyncio.wait_for(actor.stop.remote(), _STOP_S) for actor in actors]
        # Whoever does not stop in time is killed with the rest.
        await asyncio.gather(*stops, return_exceptions=True)
        if self._services is not None:
            self._services.close()
        if self._pools is not None:
            for member in members:
                self._pools.end(member)
            self._pools.close()
        self._keeper.erase()

    def _ready(self) -> Changes:
        """Raises: StartupError before everything serves."""
        if self._changes is None or self._state == "STARTING":
            raise StartupError(f"the cluster is {self._state}: {self._phase}")
        return self._changes

    async def _telemetry(self, window_s: float | None = None, fresh: bool = True) -> TelemetryWindow | None:
        """Up to now; None where the router service does not answer, of which the control loop takes care."""
        if self._services is None:
            return None
        try:
            asked = self._services.router.telemetry.remote(window_s, fresh=fresh)
            window: TelemetryWindow = await call("the router", asked, _ANSWER_S)
        except OctetError as error:
            _log.warning("no telemetry: %s", error)
            return None
        return window

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[Any]) -> None:
        """Nobody awaits what was spawned: an error there would be heard of at the next garbage collection at best."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("what should have gone on has ended", exc_info=error)

    def _on_lost(self, worker_id: WorkerId, reason: str) -> None:
        if self._is_dealt_with(worker_id):
            return
        _log.error("%s is lost: %s", worker_id, reason)
        if self._state not in ("READY", "DEGRADED"):
            return
        assert self._recovery is not None
        self._recovery.add(worker_id, reason)
        self._ready().interrupt(worker_id)
        if self._state == "READY":
            self._spawn(self._recover(self._recovery))
        self._state, self._reason = "DEGRADED", self._recovery.reason

    def _is_dealt_with(self, worker_id: WorkerId) -> bool:
        """Whoever is evicted is killed for it, which the watch sees as well: that must not interrupt what follows."""
        if self._recovery is None or self._membership is None:
            return False
        return worker_id in self._recovery or worker_id not in self._membership

    async def _recover(self, recovery: Recovery) -> None:
        await recovery.run()
        if self._state == "DEGRADED":
            self._state, self._reason = "READY", ""
        await self._ready().standby.fill()

    @property
    def _lost(self) -> str:
        """Who is lost and not dealt with yet."""
        return self._recovery.reason if self._recovery is not None else ""

    def _short(self) -> dict[Pool, int]:
        """The sizes of the pools that have fewer members."""
        assert self._membership is not None
        return {pool: size for pool, size in self._sizes.items() if len(self._membership.pool(pool)) < size}

    def _together(self, pool: Pool) -> int:
        """Members that the autoscaler never takes away again, and that may therefore share a placement group."""
        scaler = self._plan.config.autoscaler
        return getattr(scaler, pool).min_replicas if scaler.enabled else self._sizes[pool]

    async def _balance(self) -> None:
        """Observe how level the load of the experts is."""
        config = self._plan.config.balancing
        while config.auto:
            await asyncio.sleep(config.check_every_s)
            if self._state == "READY" and await self._rebalance_if_it_pays():
                await asyncio.sleep(config.cooldown_s)

    async def _look_after_services(self, services: Services, changes: Changes) -> None:
        """Replace what is lost of them, which costs no member anything."""
        now_s, gone_s = asyncio.get_running_loop().time, 0.0
        while self._state in ("READY", "DEGRADED"):
            await asyncio.sleep(self._plan.config.health.period_s)
            try:
                if await is_gone(services.frontend):
                    gone_s = gone_s or now_s()
                    await changes.replace_frontend(f"{FRONTEND}: its process is gone")
                gone_s = 0.0
                if await is_gone(services.router):
                    _log.warning("the router service is gone: another one takes its place")
                    await changes.replace_router()
                await changes.announcements.tell_again()
            except OctetError as error:
                # Whoever did not answer is looked at again at the next turn.
                _log.warning("the services were not looked after: %s", error)
            if gone_s and now_s() - gone_s > self._plan.config.ray.start_timeout_s:
                self._state, self._reason = "FAILED", f"{FRONTEND}: its process is gone, and no other one comes up"
                _log.error("the cluster has failed: %s", self._reason)

    async def _rebalance_if_it_pays(self) -> bool:
        config = self._plan.config.balancing
        window = await self._telemetry()
        if window is None or window.tokens < config.min_tokens:
            return False
        reason = f"balancedness is {window.balancedness:.3f} over {window.tokens:.0f} tokens"
        try:
            proposal = await self._ready().moves.rebalance(dry_run=False, min_gain=config.min_gain, reason=reason)
        except OctetError as error:
            _log.warning("the experts stay where they are: %s", error)
            return True
        return proposal.pays(config.min_gain)
