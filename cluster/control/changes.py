"""Changes of the running cluster: experts that move, pools that grow and shrink, members that are lost.

One at a time; each is on record with its reason and outcome. What is asked for while another is under way waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from cluster.actors import answer_of, call
from cluster.control.change_log import ChangeLog
from cluster.control.membership import Membership
from cluster.control.pools import Member, Pools
from cluster.control.preparation import Preparation
from cluster.control.services import FRONTEND, ROUTER, Services
from cluster.control.standby import Standby
from cluster.members import MemberStatus, Pool
from cluster.plan import ServingPlan
from octet.errors import ChangeRefusedError, ConfigError, OctetError, UnavailableError
from octet.ids import Epoch, WorkerId
from router.proposal import Proposal
from router.routing import Routing
from router.transition import Transition

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PROPOSE_S = 60.0
_ANSWER_S = 10.0
_STOP_S = 10.0
_POLL_S = 0.05


class Changes:
    """Carries changes out. Belongs to the controller's event loop."""

    def __init__(
        self,
        plan: ServingPlan,
        pools: Pools,
        membership: Membership,
        services: Services,
        on_members: Callable[[Sequence[Member]], None],
    ) -> None:
        """
        Args:
            on_members: told who serves, whenever that has changed and before anybody who left is stopped.
        """
        self._on_members = on_members
        self._plan, self._pools, self._membership = plan, pools, membership
        self._standby = Standby(plan, pools, membership)
        self._preparation = Preparation(pools, self._standby)
        self._services = services
        self._draining: set[WorkerId] = set()
        self._ready: dict[WorkerId, Pool] = {}
        """Processes that wait for their turn to join."""
        self._num_sizes: Counter[Pool] = Counter()
        """How often each pool was asked for a size. What was begun for an earlier one is given up."""
        self._going_through: set[asyncio.Task[Any]] = set()
        self._untold: set[WorkerId] = set()
        """Services that did not answer when they were told who serves."""
        self.log = ChangeLog()
        self.num_redundant = plan.config.pools.experts.redundant_experts
        """Slots per layer beyond one for each expert, over all shards."""

    @property
    def standby(self) -> Standby:
        return self._standby

    @property
    def starting(self) -> Mapping[Pool, int]:
        """Members on their way in, by pool: each until it is one."""
        ready = (pool for worker_id, pool in self._ready.items() if worker_id not in self._membership)
        return Counter(self._preparation.starting) + Counter(ready)

    @property
    def draining(self) -> frozenset[WorkerId]:
        """Attention workers on their way out."""
        return frozenset(self._draining)

    async def set_redundancy(self, num_redundant: int, reason: str) -> None:
        """Have so many slots for replicas, and move experts accordingly.

        Raises: OctetError, and then it is as it was.
        """
        await self._through(self._set_redundancy(num_redundant, reason))

    async def _set_redundancy(self, num_redundant: int, reason: str) -> None:
        before, self.num_redundant = self.num_redundant, num_redundant
        try:
            present = self._with_shards()
            wanted = (await self._propose(present.epoch, resized=True)).transition.target
            # Whatever it gains or loses by the loads: room is given back for other reasons.
            if wanted.placement.version != present.placement.version:
                await self._move(reason, resized=True)
        except BaseException:
            self.num_redundant = before
            raise

    async def rebalance(self, *, dry_run: bool, min_gain: float | None = None, reason: str) -> Proposal:
        """Move experts after their load, or to a second node where that is asked for.

        Args:
            min_gain: least part of what the fullest shards have to do that a plan by the earlier half of the window
                takes off them in the later one; without it, whatever is no loss by the loads of the window.

        Returns: what was planned, and done unless it is a dry run.
        Raises: OctetError, and then the placement is as it was.
        """
        # Not worth a record where there is nothing to do, so it is looked at first.
        proposal = await self._propose(self._with_shards().epoch, held_out=min_gain is not None)
        if dry_run or not proposal.pays(min_gain or 0.0):
            return proposal
        return await self._through(self._move(reason))

    def _with_shards(self) -> Routing:
        """The routing in force. Raises: ChangeRefusedError where nobody serves by it."""
        if not self._membership.pool("experts"):
            raise ChangeRefusedError("no expert shard serves, so that there is nothing to move")
        return self._membership.routing

    async def _move(self, reason: str, resized: bool = False) -> Proposal:
        """By the loads of the whole window: that a plan pays is known by now."""
        async with self.log.change("rebalance", reason) as record:
            proposals: list[Proposal] = []

            async def propose(epoch: Epoch) -> Transition:
                proposals.append(await self._propose(epoch, resized=resized))
                return proposals[0].transition

            await self._membership.reroute(propose)
            await self.tell_router()
            record.append(proposals[0].summary)
            return proposals[0]

    async def scale(self, pool: Pool, size: int, reason: str) -> None:
        """Bring a pool to this many members; what was asked of it before, and has not begun to join, is given up.

        Raises: OctetError, and then it is as it was.
        """
        num_experts = self._plan.model.n_routed_experts
        scaler = self._plan.config.autoscaler
        least = getattr(scaler, pool).min_replicas if scaler.enabled else 1
        if size < 0 or (size == 0 and least > 0):
            expected = "at least 1: only an autoscaler whose min_replicas are 0 brings an empty pool back"
            raise ConfigError(f"pools.{pool}.size", size, expected)
        if pool == "experts" and size > num_experts:
            raise ConfigError("pools.experts.size", size, f"at most the model's {num_experts} experts")
        if pool == "experts" and self._plan.device != "cpu":
            raise ConfigError("pools.experts.size", "a change while serving", "the size at the start, on GPUs")
        self._preparation.give_up(pool)
        self._num_sizes[pool] += 1
        number = self._num_sizes[pool]
        if size != len(self._membership.pool(pool)) or self.log.busy:
            await self._resize(pool, size, reason, number, shrinks=True)
        if len(self._membership.pool(pool)) < size:
            # What was under way has made it smaller.
            await self._resize(pool, size, reason, number, shrinks=True)

    async def replenish(self, pool: Pool, size: int, reason: str) -> None:
        """Let a pool have at least this many members, unless it is asked for a size meanwhile. Raises: OctetError."""
        if len(self._membership.pool(pool)) < size:
            await self._resize(pool, size, reason, self._num_sizes[pool], shrinks=False)

    async def _resize(self, pool: Pool, size: int, reason: str, number: int, shrinks: bool) -> None:
        """Processes start beside whatever else is going on; only their joining is a change.

        Until they join it can be cancelled, and nothing is left of it.

        Args:
            number: of the sizes that the pool was asked for, the one that this is for.
        """
        self._check_wanted(pool, number)
        begun_s, before = time.monotonic(), len(self._membership.pool(pool))
        ready: list[Member] = []
        if size > before:
            async with self.log.attempt("scale", reason, only_failure=True) as failure:
                failure.append(f"{pool}: {before} → {size}")
                ready = await self._preparation.members(pool, size - before)
                self._ready |= {member.worker_id: pool for member in ready}
                if pool != "experts":
                    await self._wait_for_shards(pool, number, ready)
        await self._through(self._join(pool, size, reason, number, shrinks, ready, begun_s))

    def _check_wanted(self, pool: Pool, number: int) -> None:
        """Raises: ChangeRefusedError."""
        if number != self._num_sizes[pool]:
            raise ChangeRefusedError(f"the {pool} pool was asked for another size before this one was begun")

    def _end_ready(self, ready: Sequence[Member]) -> None:
        for member in ready:
            self._ready.pop(member.worker_id, None)
            self._pools.end(member)

    async def _through(self, change: Coroutine[Any, Any, _T]) -> _T:
        """To its end, also where whoever asked for it waits no longer: of half a change nobody could say what holds."""
        task = asyncio.create_task(change)
        self._going_through.add(task)
        task.add_done_callback(self._going_through.discard)
        return await asyncio.shield(task)

    async def _wait_for_shards(self, pool: Pool, number: int, ready: Sequence[Member]) -> None:
        """Workers that come when no shard serves join after the first one. Raises: ChangeRefusedError, and they end."""
        timeout_s = self._plan.config.ray.start_timeout_s
        try:
            for _ in range(int(timeout_s / _POLL_S)):
                if self._membership.pool("experts"):
                    return
                await asyncio.sleep(_POLL_S)
                self._check_wanted(pool, number)
            raise ChangeRefusedError(f"no expert shard has come within {timeout_s:g} s")
        except BaseException:
            self._end_ready(ready)
            raise

    async def _join(
        self, pool: Pool, size: int, reason: str, number: int, shrinks: bool, ready: Sequence[Member], begun_s: float
    ) -> None:
        """Let members in or out; all parts have deadlines."""
        async with self.log.change("scale", reason) as record:
            members = self._membership.pool(pool)
            record.append(f"{pool}: {len(members)} → {size}")
            try:
                self._check_wanted(pool, number)
            except ChangeRefusedError:
                self._end_ready(ready)
                raise
            joining, surplus = ready[: max(0, size - len(members))], ready[max(0, size - len(members)) :]
            # Somebody else has scaled the pool meanwhile.
            self._end_ready(surplus)
            if joining:
                record.append(f"processes were ready after {time.monotonic() - begun_s:.1f} s")
                try:
                    await self._grow(pool, joining)
                finally:
                    for member in joining:
                        self._ready.pop(member.worker_id, None)
            elif shrinks and size < len(members):
                await self._shrink(pool, members[size:])

    def interrupt(self, worker_id: WorkerId) -> None:
        """A member is lost: give up what is being prepared, so that the loss can be dealt with."""
        self._membership.interrupt(worker_id)

    async def recover(self, lost: Mapping[WorkerId, str]) -> None:
        """Go on without these members. Raises: OctetError if that is not possible yet."""
        reason = "; ".join(f"{worker_id}: {why}" for worker_id, why in lost.items())
        async with self.log.change("recovery", reason) as record:
            members = [member for member in self._membership.all() if member.worker_id in lost]
            for member in members:
                # Whatever it still does, it does no more.
                self._pools.end(member)
                self._membership.fence(member)
            shards = {member.worker_id for member in members if member.pool == "experts"}
            if shards:
                await self._membership.give_up(shards)
            workers = [member for member in members if member.pool != "experts"]
            if workers:
                await self._membership.leave(workers)
                await self.tell_frontend()
            if shards:
                await self._go_on_without(shards)
            record.append(f"went on without {', '.join(sorted(lost))}")

    async def settle(self, mailbox: str | None, under_way: str, gone: Collection[WorkerId], record: list[str]) -> None:
        """Come to a state that everybody agrees on, after another controller has died. Within a change of the log.

        Args:
            mailbox: of the frontend; None where there is none, and another one is on its way.
            under_way: the kind of the change that it was making; may be empty.
            gone: who was to join and does not.
            record: what is done.
        """
        membership = self._membership
        if mailbox is not None and mailbox != membership.frontends.get(FRONTEND):
            await membership.meet_frontend(FRONTEND, mailbox)
        if under_way or gone or membership.adopting is not None:
            end = "is brought to its end" if membership.adopting is not None else "is given up"
            record.append(f"the {under_way or 'change'} under way {end}")
            left = await membership.settle(gone)
            self._on_members(membership.all())
            for shard in left:
                # It was to leave, or was lost, and the controller that would have ended it is gone.
                self._pools.end(shard)
                record.append(f"{shard.worker_id} is ended")
        await self.tell_frontend()
        await self.tell_router()

    async def relink(self, worker_id: WorkerId, reason: str) -> None:
        """Give a worker another lane in place of a broken one. Raises: OctetError."""
        async with self.log.change("recovery", f"{worker_id}: {reason}") as record:
            if worker_id in self._membership:
                await self._membership.relink(self._membership.member(worker_id))
                record.append("its lane is formed anew: no shard was lost")

    async def shun(self, shards: frozenset[WorkerId], reason: str) -> None:
        """Ask these shards only for what nobody else holds, and the others as always. Raises: OctetError."""

        async def propose(epoch: Epoch) -> Transition:
            current = self._membership.routing
            target = dataclasses.replace(current, shunned=shards & set(current.shards))
            return Transition(target=target, fills=(), gain=0.0, reason=reason)

        async with self.log.change("slow", reason or "no shard is slow any more") as record:
            await self._membership.reroute(propose)
            await self.tell_router()
            record.append(f"less is asked of {', '.join(sorted(shards)) or 'nobody'}")

    async def reopen(self, source: WorkerId, target: WorkerId) -> None:
        """Give two workers another KV channel in place of a broken one. Raises: OctetError."""
        async with self.log.change("recovery", f"the KV channel from {source} to {target} has broken") as record:
            if source in self._membership and target in self._membership:
                await self._membership.reopen(self._membership.member(source), self._membership.member(target))
                record.append("another one is open")

    async def replace_router(self) -> None:
        """Let another process serve in place of one that is gone. Raises: OctetError."""
        self._services.replace_router()
        await self.tell_router()

    async def replace_frontend(self, reason: str) -> None:
        """Let another process serve in place of one that is gone; whatever else goes on, goes on.

        Raises: OctetError if that is not possible yet.
        """
        async with self.log.attempt("recovery", reason) as record:
            await self._membership.meet_frontend(FRONTEND, await self._services.replace_frontend())
            mailboxes = self._membership.mailboxes
            try:
                await self._services.serve(mailboxes("prefill"), mailboxes("decode"), self.draining)
            except OctetError:
                # It would answer, and refuse every request: the next one may be luckier.
                self._services.give_up_frontend()
                raise
            record.append(f"another one serves on port {self._services.port}")

    async def tell_frontend(self) -> None:
        """Who serves, and who is given nothing new."""

        def set_workers() -> Awaitable[None]:
            prefill, decode = self._membership.mailboxes("prefill"), self._membership.mailboxes("decode")
            told: Awaitable[None] = self._services.frontend.set_workers.remote(prefill, decode, sorted(self._draining))
            return told

        await self._tell(FRONTEND, set_workers)

    async def tell_router(self) -> None:
        """Who serves, and by what routing."""
        self._on_members(self._membership.all())

        def watch() -> Awaitable[None]:
            actors = {member.worker_id: member.actor for member in self._membership.all()}
            told: Awaitable[None] = self._services.router.watch.remote(self._membership.routing, actors)
            return told

        await self._tell(ROUTER, watch)

    async def tell_again(self) -> None:
        """Services that did not answer the last time."""
        if FRONTEND in self._untold:
            await self.tell_frontend()
        if ROUTER in self._untold:
            await self.tell_router()

    async def _tell(self, service: WorkerId, ask: Callable[[], Awaitable[None]]) -> None:
        """What is so already, and no less so for a service that does not hear it: one that is gone is replaced and the
        next one told all of it, any other is told again. Who is told twice knows no more."""
        self._untold.discard(service)
        try:
            await call(service, answer_of(ask), _ANSWER_S)
        except UnavailableError as error:
            self._untold.add(service)
            _log.warning("%s was not told who serves: %s", service, error)

    async def _grow(self, pool: Pool, members: Sequence[Member]) -> None:
        try:
            if pool == "experts":
                # Where none is left, those that come take everything over, as after the loss of all.
                gone = () if self._membership.pool("experts") else self._membership.routing.shards
                await self._reroute(joining=members, leaving=gone, lost=gone)
            else:
                await self._membership.enter(members)
                await self.tell_frontend()
        except BaseException:
            for member in members:
                self._pools.end(member)
            raise
        await self.tell_router()

    async def _shrink(self, pool: Pool, leaving: Sequence[Member]) -> None:
        if pool == "experts" and len(leaving) == len(self._membership.pool("experts")):
            if workers := self._membership.pool("prefill") + self._membership.pool("decode"):
                raise ChangeRefusedError(f"shards leave after the workers, of which {len(workers)} are there")
            # The routing stays as it was: nobody routes by it, and the next shards take over from it.
            await self._membership.leave(leaving)
        elif pool == "experts":
            await self._reroute(leaving=[member.worker_id for member in leaving])
        else:
            await self._drain(leaving)
        await self.tell_router()
        for member in leaving:
            with contextlib.suppress(OctetError):
                # One that does not stop in time is killed all the same.
                await call(member.worker_id, member.actor.stop.remote(), _STOP_S)
            self._pools.end(member)

    async def _drain(self, leaving: Sequence[Member]) -> None:
        """Let attention workers end what they have, or hand it over, and part with them."""
        ids = {member.worker_id for member in leaving}
        self._draining |= ids
        try:
            await self.tell_frontend()
            if leaving[0].pool == "decode":
                with contextlib.suppress(OctetError):
                    # Sequences that cannot be handed over end here, or start again elsewhere.
                    await self._membership.hand_over(leaving)
            for _ in range(int(self._plan.config.frontend.drain_s / _POLL_S)):
                if await self._idle(leaving):
                    break
                await asyncio.sleep(_POLL_S)
        finally:
            self._draining -= ids
        # What is left there starts again elsewhere.
        await self._membership.leave(leaving)
        await self.tell_frontend()

    async def _idle(self, members: Sequence[Member]) -> bool:
        """Whether none has anything left to end. One that does not answer will not."""
        asked = (call(m.worker_id, answer_of(partial(m.actor.status.remote)), _ANSWER_S) for m in members)
        statuses: list[MemberStatus | BaseException] = await asyncio.gather(*asked, return_exceptions=True)
        loads = [found.load for found in statuses if isinstance(found, MemberStatus) and found.load is not None]
        return all(load.running == load.waiting == load.leases == 0 for load in loads)

    async def _go_on_without(self, shards: Collection[WorkerId]) -> None:
        """Survivors take over what only these held; where nobody survives, new ones take over all."""
        survivors = [shard for shard in self._membership.routing.shards if shard not in shards]
        joining: list[Member] = []
        if not survivors:
            joining = await self._preparation.unless_stopped("experts", len(shards))
        try:
            await self._reroute(joining=joining, leaving=shards, lost=shards)
        except BaseException:
            for member in joining:
                self._pools.end(member)
            raise
        await self.tell_router()

    async def _reroute(
        self,
        joining: Sequence[Member] = (),
        leaving: Collection[WorkerId] = (),
        lost: Collection[WorkerId] = (),
    ) -> None:
        async def propose(epoch: Epoch) -> Transition:
            newcomers = [member.worker_id for member in joining]
            return (await self._propose(epoch, newcomers, leaving, lost)).transition

        await self._membership.reroute(propose, joining=joining, leaving=leaving, lost=lost)

    async def _propose(
        self,
        epoch: Epoch,
        joining: Sequence[WorkerId] = (),
        leaving: Collection[WorkerId] = (),
        lost: Collection[WorkerId] = (),
        resized: bool = False,
        held_out: bool = False,
    ) -> Proposal:
        router, asked = self._services.router, (self._membership.routing, epoch, self.num_redundant)
        others = (tuple(joining), tuple(leaving), tuple(lost), self._domains(joining, {*leaving, *lost}))
        proposed = answer_of(lambda: router.propose.remote(*asked, *others, resized, held_out))
        return await call("the router", proposed, _PROPOSE_S)

    def _domains(self, joining: Sequence[WorkerId], gone: Collection[WorkerId]) -> dict[WorkerId, int] | None:
        """The node of every shard, as a number; None where all that stay are on one: each then fails for itself."""
        shards = (*self._membership.routing.shards, *joining)
        endpoints = {shard: self._membership.endpoint(shard) for shard in shards}
        node_of: dict[WorkerId, str] = {shard: found.node_id if found else shard for shard, found in endpoints.items()}
        if len({node_of[shard] for shard in shards if shard not in gone}) == 1:
            return None
        nodes = sorted(set(node_of.values()))
        return {shard: nodes.index(node) for shard, node in node_of.items()}
