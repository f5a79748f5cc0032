"""Processes that are started and loaded before they are needed, so that a pool grows without their start-up time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from cluster.actors import call
from cluster.control.member_status import member_status
from cluster.control.membership import Membership
from cluster.control.pools import Member, Pools
from cluster.members import POOLS, Pool
from cluster.plan import ServingPlan
from octet.errors import OctetError

_log = logging.getLogger(__name__)

_ANSWER_S = 2.0


class Standby:
    """Members that serve nothing yet. Belongs to the controller's event loop."""

    def __init__(self, plan: ServingPlan, pools: Pools, membership: Membership) -> None:
        self._plan, self._pools, self._membership = plan, pools, membership
        self._ready: dict[Pool, list[Member]] = {pool: [] for pool in POOLS}
        self._filling = asyncio.Lock()
        self.note: Callable[[], None] = lambda: None
        """Called when what another controller needs to know has changed."""

    def all(self) -> list[Member]:
        return [member for members in self._ready.values() for member in members]

    def take_over(self, members: Sequence[Member]) -> None:
        """These are ready; of a controller that takes the place of another."""
        for member in members:
            self._ready[member.pool].append(member)

    async def fill(self) -> None:
        """Start as many as each pool's config asks for. Where Ray has no room for them, there are fewer."""
        async with self._filling:
            await self._end_lost()
            for pool in POOLS:
                wanted: int = getattr(self._plan.config.pools, pool).standby
                if (missing := wanted - len(self._ready[pool])) > 0:
                    try:
                        self._ready[pool] += await self.start(pool, missing)
                        self.note()
                    except OctetError as error:
                        _log.warning("no %s process on standby: %s", pool, error)

    async def _end_lost(self) -> None:
        """Nobody watches these, and one that is lost would be missed only when it was needed."""
        members = self.all()
        found = await asyncio.gather(*(member_status(member) for member in members))
        for member, status in zip(members, found, strict=True):
            if status.state == "FAILED" and member in self._ready[member.pool]:
                _log.warning("a process on standby is lost: %s", status.reason)
                self._ready[member.pool].remove(member)
                self._pools.end(member)
                self.note()

    async def take(self, pool: Pool, count: int) -> list[Member]:
        """Up to so many that live."""
        taken: list[Member] = []
        while self._ready[pool] and len(taken) < count:
            member = self._ready[pool].pop(0)
            # What joins is on standby no more, however far it comes.
            self.note()
            try:
                await call(member.worker_id, member.actor.status.remote(), _ANSWER_S)
            except OctetError as error:
                _log.warning("a process on standby is lost: %s", error)
                self._pools.end(member)
            except BaseException:
                self._ready[pool] += [member, *taken]
                raise
            else:
                taken.append(member)
        return taken

    async def start(self, pool: Pool, count: int) -> list[Member]:
        """New processes, loaded. Raises: OctetError, and then there are none of them."""
        members = await self._pools.start(pool, count, self._plan.config.ray.start_timeout_s)
        try:
            await self._membership.reach(members)
            await self._membership.load(members)
        except BaseException:
            for member in members:
                self._pools.end(member)
            raise
        return members
