"""Processes that are started and loaded before they are needed, so that a pool grows without their start-up time."""

from __future__ import annotations

import asyncio
import logging

from cluster.members import POOLS, Pool
from cluster.membership import Membership
from cluster.plan import ServingPlan
from cluster.pools import Member, Pools, call
from octet.errors import OctetError

_log = logging.getLogger(__name__)

_ANSWER_S = 2.0


class Standby:
    """Members that serve nothing yet. Belongs to the controller's event loop."""

    def __init__(self, plan: ServingPlan, pools: Pools, membership: Membership) -> None:
        self._plan, self._pools, self._membership = plan, pools, membership
        self._ready: dict[Pool, list[Member]] = {pool: [] for pool in POOLS}
        self._filling = asyncio.Lock()

    def all(self) -> list[Member]:
        return [member for members in self._ready.values() for member in members]

    async def fill(self) -> None:
        """Start as many as each pool's config asks for. Where Ray has no room for them, there are fewer."""
        async with self._filling:
            for pool in POOLS:
                wanted: int = getattr(self._plan.config.pools, pool).standby
                if missing := wanted - len(self._ready[pool]):
                    try:
                        self._ready[pool] += await self.start(pool, missing)
                    except OctetError as error:
                        _log.warning("no %s process on standby: %s", pool, error)

    async def take(self, pool: Pool, count: int) -> list[Member]:
        """Up to so many that live."""
        taken: list[Member] = []
        while self._ready[pool] and len(taken) < count:
            member = self._ready[pool].pop(0)
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
