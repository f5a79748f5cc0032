"""Who serves, and how they are joined: how members enter and leave, and how routing goes from one state to the next.

Everything here is an action on members that somebody decided on (`cluster.control.controller`), one at a time. What
fails before it is adopted is undone, and what serves goes on as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import TypeVar

from cluster.actors import answer_of, call
from cluster.control.pools import Member, call_all
from cluster.members import Endpoint, Pool, Role
from cluster.plan import ServingPlan
from cluster.workers.pool_actors import node_id
from octet.errors import ChangeRefusedError, OctetError, UnavailableError
from octet.faults import reach
from octet.ids import Epoch, WorkerId
from router.placement import EMPTY
from router.routing import Routing
from router.transition import SlotFill, Transition

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

ATTENTION: tuple[Role, ...] = ("prefill", "decode")
_MARGIN_S = 5.0
"""What a call may take beyond the deadline of the wait inside it."""


class Membership:
    """The members that serve, and the routing in force. Belongs to the controller's event loop."""

    def __init__(
        self,
        plan: ServingPlan,
        frontends: dict[WorkerId, str],
        on_astray: Callable[[WorkerId, str], None] = lambda worker_id, reason: None,
    ) -> None:
        """
        Args:
            frontends: their mailboxes.
            on_astray: told of a worker that does not follow the others to a routing; its process is killed by then.
        """
        self._on_astray = on_astray
        self._plan, self._frontends = plan, frontends
        self._members: dict[WorkerId, Member] = {}
        self._endpoints: dict[WorkerId, Endpoint] = {}
        self._since_s: dict[WorkerId, float] = {}
        self.next_epoch = int(plan.routing.epoch)
        self._lane_s = plan.config.lane.connect_s + _MARGIN_S
        self._adopt_s = plan.config.lane.timeout_s + _MARGIN_S
        self._lost = asyncio.Event()
        self._gone: set[WorkerId] = set()
        self._partings: dict[WorkerId, asyncio.Event] = {}
        """Set when a member is lost whose answer somebody waits for."""
        self.routing = plan.routing
        self.adopting: tuple[Routing, tuple[Member, ...]] | None = None
        """What workers go over to now, and the shards that are members from then on: there is no way back."""
        self.note: Callable[[], None] = lambda: None
        """Called when what another controller needs to know has changed."""

    def __contains__(self, worker_id: object) -> bool:
        return worker_id in self._members

    def all(self) -> list[Member]:
        return list(self._members.values())

    def member(self, worker_id: WorkerId) -> Member:
        return self._members[worker_id]

    def pool(self, pool: Pool) -> list[Member]:
        return [member for member in self._members.values() if member.pool == pool]

    @property
    def frontends(self) -> dict[WorkerId, str]:
        """Their mailboxes."""
        return dict(self._frontends)

    def endpoint(self, worker_id: WorkerId) -> Endpoint | None:
        """Of a member, or of one that has been started."""
        return self._endpoints.get(worker_id)

    def ages_s(self) -> dict[WorkerId, float]:
        """How long each member has served."""
        now_s = time.monotonic()
        return {worker_id: now_s - self._since_s[worker_id] for worker_id in self._members}

    def mailboxes(self, pool: Pool) -> dict[WorkerId, str]:
        """Of the members that serve."""
        return {member.worker_id: self._endpoints[member.worker_id].mailbox for member in self.pool(pool)}

    async def reach(self, members: Sequence[Member]) -> None:
        """Wait until new processes answer, and note where they can be reached. Raises: OctetError."""
        start_s = self._plan.config.ray.start_timeout_s
        endpoints = await call_all([(member, member.actor.endpoint.remote()) for member in members], start_s)
        self._endpoints |= {endpoint.worker_id: endpoint for endpoint in endpoints}

    async def load(self, members: Sequence[Member], routing: Routing | None = None) -> None:
        """Let new processes read their weights; shards what this routing gives them, or nothing yet.

        Raises: OctetError.
        """
        start_s = self._plan.config.ray.start_timeout_s
        nothing = {layer: [EMPTY] * self.routing.placement.slots_per_shard for layer in self.routing.placement.layers}
        calls = []
        for member in members:
            if member.pool != "experts":
                calls.append((member, member.actor.load.remote()))
            elif routing is not None and member.worker_id in routing.shards:
                calls.append((member, member.actor.load.remote(routing.held_by(member.worker_id))))
            else:
                calls.append((member, member.actor.load.remote(nothing)))
        await call_all(calls, start_s)

    async def found(self, members: Sequence[Member]) -> None:
        """Join the members that the cluster starts with; attention workers serve from here on. Raises: OctetError."""
        shards = [member for member in members if member.pool == "experts"]
        self._members |= {member.worker_id: member for member in shards}
        self._note_new(shards)
        await self.enter([member for member in members if member.pool != "experts"])

    async def enter(self, workers: Sequence[Member]) -> None:
        """Take in loaded attention workers: lanes, KV channels, mailboxes; they serve by the routing in force.

        Raises: OctetError, and then they are not members.
        """
        shards, everyone = self.pool("experts"), [*self._attention(), *workers]
        if not shards:
            raise ChangeRefusedError("no expert shard serves")
        sources = [member for member in everyone if member.pool == "prefill"]
        targets = [member for member in everyone if member.pool == "decode"]
        pairs = [(s, t) for s in sources for t in targets if s in workers or t in workers]
        self._heed_losses()
        try:
            await self._unless_lost(self._link(workers, shards, self._epoch()))
            await self._unless_lost(self._open_channels(pairs))
            frontends = self._frontends
            mailboxes = frontends | {m.worker_id: self._endpoints[m.worker_id].mailbox for m in everyone}
            meets = [(member, member.actor.meet.remote(mailboxes)) for member in everyone]
            await self._unless_lost(call_all(meets, self._lane_s))
            # The first placement that a process sees may let it compile its planner.
            start_s = self._plan.config.ray.start_timeout_s
            starts = [(member, member.actor.start.remote(self.routing)) for member in workers]
            await self._unless_lost(call_all(starts, start_s))
        except OctetError:
            await self._forget({member.worker_id for member in workers})
            raise
        self._members |= {member.worker_id: member for member in workers}
        self._note_new(workers)
        self.note()
        if self._frontends is not frontends:
            # It was replaced meanwhile, and these were not members yet.
            await self._meet_frontends(workers)

    async def meet_frontend(self, worker_id: WorkerId, mailbox: str) -> None:
        """Let every attention worker write to a frontend there, and no more to where it was before."""
        self._frontends = self._frontends | {worker_id: mailbox}
        self.note()
        await self._meet_frontends(self._attention())

    async def hand_over(self, leaving: Sequence[Member]) -> None:
        """Let decode workers that leave give their sequences to those that stay. Raises: OctetError."""
        ids = {member.worker_id for member in leaving}
        heirs = [member for member in self.pool("decode") if member.worker_id not in ids]
        named = [heir.worker_id for heir in heirs]
        self._heed_losses()
        await self._unless_lost(self._open_channels([(source, target) for source in leaving for target in heirs]))
        calls = [(member, member.actor.hand_over_to.remote(named)) for member in leaving]
        await self._unless_lost(call_all(calls, self._lane_s))

    def fence(self, member: Member) -> None:
        """Kill a member's process by its pid, if it is on this node: one that hangs does not hear Ray."""
        endpoint = self._endpoints.get(member.worker_id)
        if endpoint is not None and endpoint.node_id == node_id():
            with contextlib.suppress(ProcessLookupError):
                os.kill(endpoint.pid, signal.SIGKILL)

    async def give_up(self, shards: Collection[WorkerId]) -> None:
        """Let workers wait no longer for shards that are lost: of one that is cut off no connection breaks by itself.

        Best effort.
        """
        named = sorted(shards)
        calls = [self._ask(m, m.actor.give_up.remote(named), _MARGIN_S) for m in self._attention()]
        await asyncio.gather(*calls, return_exceptions=True)

    async def unless_parted(self, worker_id: WorkerId, work: Awaitable[_T]) -> _T:
        """Await what depends on a member. Raises: UnavailableError as soon as it is lost.

        Of a member that is cut off no call ends by itself, and the loss waits for whatever waits for it.
        """
        parting = self._partings.setdefault(worker_id, asyncio.Event())
        if worker_id in self._gone:
            parting.set()
        working, parted = asyncio.ensure_future(work), asyncio.ensure_future(parting.wait())
        try:
            await asyncio.wait((working, parted), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise UnavailableError(f"{worker_id} was lost meanwhile")
        finally:
            working.cancel()
            parted.cancel()

    async def relink(self, worker: Member) -> None:
        """Form the lane of a worker anew, that has none though no shard is lost. Raises: OctetError."""
        self._heed_losses()
        await self._unless_lost(self._link([worker], self.pool("experts"), self._epoch()))
        adopting = call(worker.worker_id, worker.actor.adopt.remote(self.routing), self._adopt_s)
        await self._unless_lost(adopting)

    async def reopen(self, source: Member, target: Member) -> None:
        """Another KV channel in place of one that is broken. Raises: OctetError."""
        self._heed_losses()
        await self._unless_lost(self._open_channels([(source, target)]))

    async def leave(self, members: Sequence[Member]) -> None:
        """These are members no more; nothing joins the others to them. Shards only when no worker is there."""
        gone = {member.worker_id for member in members}
        self._members = {worker_id: m for worker_id, m in self._members.items() if worker_id not in gone}
        self.note()
        await self._forget(gone)

    async def reroute(
        self,
        propose: Callable[[Epoch], Awaitable[Transition]],
        *,
        joining: Sequence[Member] = (),
        leaving: Collection[WorkerId] = (),
        lost: Collection[WorkerId] = (),
    ) -> Transition:
        """Go to another routing while everybody serves: link, prepare, adopt, retire.

        Args:
            propose: decides, once the shards that join are linked; given the epoch of the attempt.
            joining: shards that are loaded, and hold nothing.
            leaving: shards that are no longer members afterwards.
            lost: those of them that are gone already.

        Returns: what was done.
        Raises: OctetError, and then everything is as it was, less the shards that were lost meanwhile.
        """
        before, epoch, attempt = self.routing, self._epoch(), ""
        newcomers = {member.worker_id: member for member in joining}
        shards = {member.worker_id: member for member in self.pool("experts")} | newcomers
        present = {worker_id: member for worker_id, member in shards.items() if worker_id not in lost}
        if not present:
            raise ChangeRefusedError("no expert shard is there")
        self._heed_losses(known=lost)
        try:
            await self._unless_lost(self._link(self._attention(), joining, epoch))
            reach("change.linked")
            step = await self._unless_lost(propose(epoch))
            attempt = f"{epoch}.{step.target.placement.version}"
            await self._unless_lost(self._prepare(step.fills, present, attempt))
            reach("change.prepared")
        except OctetError:
            # Lanes to those that were to join end with their next adoption; what was filled is emptied.
            survivors = [member for worker_id, member in present.items() if worker_id in before.shards]
            await self._retire(survivors, before, given_up=attempt)
            raise
        self.adopting = (step.target, tuple(joining))
        self.note()
        await self._adopt(step.target)
        reach("change.adopted")
        self._go_over()
        await self._retire([shards[worker_id] for worker_id in step.target.shards], step.target)
        if leaving:
            await self._forget(leaving)
        return step

    def take_over(self, members: Sequence[Member], endpoints: Iterable[Endpoint], next_epoch: int) -> None:
        """Know who serves; of a controller that takes the place of another, before anything else."""
        self._members = {member.worker_id: member for member in members}
        self._endpoints |= {endpoint.worker_id: endpoint for endpoint in endpoints}
        self.next_epoch = next_epoch
        self._since_s = dict.fromkeys(self._members, time.monotonic())

    async def settle(self, gone: Collection[WorkerId]) -> list[Member]:
        """Come to the end of what was begun by another controller, or back to before it.

        What workers may have adopted already is adopted by all of them: every shard in it is linked and filled. Before
        that, nobody asks for what was filled.

        Args:
            gone: who was to join and does not.

        Returns: shards that are members no longer, and whose processes nobody has ended.
        """
        shards = self.pool("experts")
        routing = self.routing if self.adopting is None else self.adopting[0]
        await self._adopt(routing)
        if self.adopting is not None:
            self._go_over()
        await self._retire(self.pool("experts"), self.routing)
        left = [shard for shard in shards if shard.worker_id not in self]
        await self._forget({*gone, *(shard.worker_id for shard in left)})
        return left

    def _go_over(self) -> None:
        """Everybody has adopted it."""
        assert self.adopting is not None
        self.routing, joining = self.adopting
        self.adopting = None
        shards = set(self.routing.shards)
        self._members |= {member.worker_id: member for member in joining}
        self._members = {key: m for key, m in self._members.items() if m.pool != "experts" or key in shards}
        self._note_new(joining)
        self.note()

    def _epoch(self) -> Epoch:
        """Of the next attempt; another one each time, whichever controller makes it."""
        epoch = Epoch(self.next_epoch)
        self.next_epoch += 1
        self.note()
        return epoch

    def interrupt(self, worker_id: WorkerId) -> None:
        """A member is lost: what is being prepared is given up, so that the loss can be dealt with."""
        self._gone.add(worker_id)
        self._lost.set()
        self._partings.setdefault(worker_id, asyncio.Event()).set()

    def _heed_losses(self, known: Collection[WorkerId] = ()) -> None:
        """From here on, `_unless_lost` gives up; at once where a member is lost that nobody has dealt with yet."""
        self._lost.clear()
        self._gone &= self._members.keys()
        self._partings = {key: parting for key, parting in self._partings.items() if key in self._members}
        if self._gone - set(known):
            self._lost.set()

    def _note_new(self, members: Sequence[Member]) -> None:
        self._since_s |= dict.fromkeys((member.worker_id for member in members), time.monotonic())

    def _attention(self) -> list[Member]:
        return [member for member in self._members.values() if member.pool != "experts"]

    async def _meet_frontends(self, workers: Sequence[Member]) -> None:
        """Best effort: a worker that does not answer is dealt with when it is found lost."""
        meets = [answer_of(partial(m.actor.meet.remote, self._frontends)) for m in workers]
        calls = [self._ask(m, meet, _MARGIN_S) for m, meet in zip(workers, meets, strict=True)]
        for worker, outcome in zip(workers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                _log.warning("%s does not know the frontend: %s", worker.worker_id, outcome)

    async def _link(self, workers: Sequence[Member], shards: Sequence[Member], epoch: Epoch) -> None:
        """A lane between each of the workers and each of the shards, beside what there is."""
        if not shards:
            return
        ids = [shard.worker_id for shard in shards]
        calls: list[tuple[Member, Awaitable[None]]] = []
        for worker in workers:
            endpoint = self._endpoints[worker.worker_id]
            calls.append((worker, worker.actor.link.remote(ids, epoch)))
            calls += [(shard, shard.actor.link.remote(endpoint, worker.pool, ids, epoch)) for shard in shards]
        await call_all(calls, self._lane_s)

    async def _open_channels(self, pairs: Iterable[tuple[Member, Member]]) -> None:
        calls: list[tuple[Member, Awaitable[None]]] = []
        # A name that nobody has met under before, whichever controller it was.
        attempt = time.time_ns()
        for source, target in pairs:
            calls.append((source, source.actor.send_to.remote(target.worker_id, attempt)))
            calls.append((target, target.actor.receive_from.remote(self._endpoints[source.worker_id], attempt)))
        await call_all(calls, self._lane_s)

    async def _forget(self, gone: Collection[WorkerId]) -> None:
        """Best effort: a member that does not answer is dealt with when it is found lost."""
        calls = [self._ask(m, m.actor.forget.remote(sorted(gone)), _MARGIN_S) for m in self.all()]
        await asyncio.gather(*calls, return_exceptions=True)

    async def _prepare(self, fills: Sequence[SlotFill], shards: dict[WorkerId, Member], attempt: str) -> None:
        """Let shards fill free slots, from each other where they can."""
        by_shard: dict[WorkerId, list[SlotFill]] = defaultdict(list)
        lent: dict[tuple[WorkerId, WorkerId], list[tuple[int, int]]] = defaultdict(list)
        for fill in fills:
            by_shard[fill.shard].append(fill)
            if fill.source is not None:
                lent[fill.source, fill.shard].append((fill.layer, fill.expert))
        prepares = []
        for worker_id, wanted in by_shard.items():
            sources = {fill.source for fill in wanted if fill.source is not None}
            lenders = {source: self._endpoints[source] for source in sources}
            prepares.append((shards[worker_id], shards[worker_id].actor.prepare.remote(wanted, lenders, attempt)))
        lends = [
            call(source, shards[source].actor.lend.remote(target, experts, attempt), self._prepare_s(len(fills)))
            for (source, target), experts in lent.items()
        ]
        lending = asyncio.gather(*lends, return_exceptions=True)
        try:
            await call_all(prepares, self._prepare_s(len(fills)))
        finally:
            # Nobody waits for a lender: what it fails at, the other shard makes up for from the checkpoint.
            lending.cancel()

    def _prepare_s(self, num_fills: int) -> float:
        """A generous deadline: at 20 MiB/s, from the slower of a lender and the checkpoint."""
        return self._lane_s + num_fills * self._plan.census.expert_bytes / (20 * 2**20)

    async def _adopt(self, routing: Routing) -> None:
        """From here on there is no way back: a worker that does not follow would ask for what is retired."""
        workers = self._attention()
        calls = [self._ask(m, m.actor.adopt.remote(routing), self._adopt_s) for m in workers]
        for worker, outcome in zip(workers, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                _log.warning("%s did not adopt placement %d: %s", worker.worker_id, routing.placement.version, outcome)
                self.fence(worker)
                if worker.worker_id in self._gone:
                    continue
                self._on_astray(worker.worker_id, f"it did not adopt placement {routing.placement.version}: {outcome}")

    async def _retire(self, shards: Sequence[Member], routing: Routing, given_up: str = "") -> None:
        """
        Args:
            given_up: the attempt that shards may still prepare for.
        """
        retires = [(m, m.actor.retire.remote(routing.held_by(m.worker_id), given_up)) for m in shards]
        calls = [self._ask(member, retire, self._lane_s) for member, retire in retires]
        for shard, outcome in zip(shards, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(outcome, BaseException):
                _log.warning("%s keeps slots that nobody asks for: %s", shard.worker_id, outcome)

    async def _ask(self, member: Member, work: Awaitable[_T], timeout_s: float) -> _T:
        """A call of a member. Raises: OctetError, also as soon as it is lost."""
        return await self.unless_parted(member.worker_id, call(member.worker_id, work, timeout_s))

    async def _unless_lost(self, work: Awaitable[_T]) -> _T:
        """Raises: UnavailableError as soon as a member is lost."""
        working = asyncio.ensure_future(work)
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait((working, lost), return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
        finally:
            working.cancel()
            lost.cancel()
        await asyncio.gather(working, return_exceptions=True)
        raise UnavailableError("a member was lost meanwhile")
