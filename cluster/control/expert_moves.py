"""Experts that move between shards: after their load, for more or fewer replicas, and as shards come and go."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from cluster.actors import answer_of, call
from cluster.control.announcements import Announcements
from cluster.control.change_log import ChangeLog
from cluster.control.membership import Membership
from cluster.control.pools import Member
from cluster.control.services import Services
from octet.errors import ChangeRefusedError
from octet.ids import Epoch, WorkerId
from router.proposal import Proposal
from router.routing import Routing
from router.transition import Transition

_PROPOSE_S = 60.0


class ExpertMoves:
    """Belongs to the controller's event loop. The router service proposes, for it knows the loads."""

    def __init__(
        self,
        membership: Membership,
        services: Services,
        announcements: Announcements,
        log: ChangeLog,
        num_redundant: int,
    ) -> None:
        self._membership, self._services, self._announcements, self._log = membership, services, announcements, log
        self.num_redundant = num_redundant
        """Slots per layer beyond one for each expert, over all shards."""

    async def set_redundancy(self, num_redundant: int, reason: str) -> None:
        """Have so many slots for replicas, and move experts accordingly.

        Raises: OctetError, and then it is as it was.
        """
        await self._log.through(self._set_redundancy(num_redundant, reason))

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
        return await self._log.through(self._move(reason))

    def _with_shards(self) -> Routing:
        """The routing in force. Raises: ChangeRefusedError where nobody serves by it."""
        if not self._membership.pool("experts"):
            raise ChangeRefusedError("no expert shard serves, so that there is nothing to move")
        return self._membership.routing

    async def _move(self, reason: str, resized: bool = False) -> Proposal:
        """By the loads of the whole window: that a plan pays is known by now."""
        async with self._log.change("rebalance", reason) as record:
            proposals: list[Proposal] = []

            async def propose(epoch: Epoch) -> Transition:
                proposals.append(await self._propose(epoch, resized=resized))
                return proposals[0].transition

            await self._membership.reroute(propose)
            await self._announcements.tell_router()
            record.append(proposals[0].summary)
            return proposals[0]

    async def shun(self, shards: frozenset[WorkerId], reason: str) -> None:
        """Ask these shards only for what nobody else holds, and the others as always. Raises: OctetError."""

        async def propose(epoch: Epoch) -> Transition:
            current = self._membership.routing
            target = dataclasses.replace(current, shunned=shards & set(current.shards))
            return Transition(target=target, fills=(), gain=0.0, reason=reason)

        async with self._log.change("slow", reason or "no shard is slow any more") as record:
            await self._membership.reroute(propose)
            await self._announcements.tell_router()
            record.append(f"less is asked of {', '.join(sorted(shards)) or 'nobody'}")

    async def reroute(
        self,
        joining: Sequence[Member] = (),
        leaving: Collection[WorkerId] = (),
        lost: Collection[WorkerId] = (),
    ) -> None:
        """Let shards in or out, with what is moved for it. Within a change of the log. Raises: OctetError.

        Args:
            lost: of those that leave, who can be asked for nothing any more.
        """

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
