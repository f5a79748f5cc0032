"""Changes of the running cluster: experts that move, pools that grow and shrink, members that are lost.

One at a time; each is on record with its reason and outcome. What is asked for while another is under way waits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from cluster.control.announcements import Announcements
from cluster.control.change_log import ChangeLog
from cluster.control.expert_moves import ExpertMoves
from cluster.control.membership import Membership
from cluster.control.pools import Member, Pools
from cluster.control.preparation import Preparation
from cluster.control.resizing import Resizing
from cluster.control.services import FRONTEND, Services
from cluster.control.standby import Standby
from cluster.members import Pool
from cluster.plan import ServingPlan
from octet.errors import OctetError
from octet.ids import WorkerId


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
        self._pools, self._membership, self._services = pools, membership, services
        self.log = ChangeLog()
        self.standby = Standby(plan, pools, membership)
        self._preparation = Preparation(pools, self.standby)
        self.announcements = Announcements(membership, services, on_members)
        redundant = plan.config.pools.experts.redundant_experts
        self.moves = ExpertMoves(membership, services, self.announcements, self.log, redundant)
        self.sizes = Resizing(plan, pools, membership, self._preparation, self.moves, self.announcements, self.log)

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
                await self.announcements.tell_frontend()
            if shards:
                await self._go_on_without(shards)
            record.append(f"went on without {', '.join(sorted(lost))}")

    async def replenish(self, pool: Pool, size: int, reason: str) -> None:
        """Let a pool have at least this many members, unless it is asked for a size meanwhile. Raises: OctetError."""
        await self.sizes.replenish(pool, size, reason)

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
            self.announcements.tell_watch()
            for shard in left:
                # It was to leave, or was lost, and the controller that would have ended it is gone.
                self._pools.end(shard)
                record.append(f"{shard.worker_id} is ended")
        await self.announcements.tell_frontend()
        await self.announcements.tell_router()

    async def relink(self, worker_id: WorkerId, reason: str) -> None:
        """Give a worker another lane in place of a broken one. Raises: OctetError."""
        async with self.log.change("recovery", f"{worker_id}: {reason}") as record:
            if worker_id in self._membership:
                await self._membership.relink(self._membership.member(worker_id))
                record.append("its lane is formed anew: no shard was lost")

    async def reopen(self, source: WorkerId, target: WorkerId) -> None:
        """Give two workers another KV channel in place of a broken one. Raises: OctetError."""
        async with self.log.change("recovery", f"the KV channel from {source} to {target} has broken") as record:
            if source in self._membership and target in self._membership:
                await self._membership.reopen(self._membership.member(source), self._membership.member(target))
                record.append("another one is open")

    async def replace_router(self) -> None:
        """Let another process serve in place of one that is gone. Raises: OctetError."""
        self._services.replace_router()
        await self.announcements.tell_router()

    async def replace_frontend(self, reason: str) -> None:
        """Let another process serve in place of one that is gone; whatever else goes on, goes on.

        Raises: OctetError if that is not possible yet.
        """
        async with self.log.attempt("recovery", reason) as record:
            await self._membership.meet_frontend(FRONTEND, await self._services.replace_frontend())
            mailboxes = self._membership.mailboxes
            try:
                await self._services.serve(mailboxes("prefill"), mailboxes("decode"), self.announcements.draining)
            except OctetError:
                # It would answer, and refuse every request: the next one may be luckier.
                self._services.give_up_frontend()
                raise
            record.append(f"another one serves on port {self._services.port}")

    async def _go_on_without(self, shards: Collection[WorkerId]) -> None:
        """Survivors take over what only these held; where nobody survives, new ones take over all."""
        survivors = [shard for shard in self._membership.routing.shards if shard not in shards]
        joining: list[Member] = []
        if not survivors:
            joining = await self._preparation.unless_stopped("experts", len(shards))
        try:
            await self.moves.reroute(joining=joining, leaving=shards, lost=shards)
        except BaseException:
            for member in joining:
                self._pools.end(member)
            raise
        await self.announcements.tell_router()
