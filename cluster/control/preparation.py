"""Members that are on their way in: processes that start and load, beside whatever else is going on."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Mapping

from cluster.control.pools import Member, Pools
from cluster.control.standby import Standby
from cluster.members import Pool
from octet.errors import ChangeRefusedError


class Preparation:
    """Belongs to the controller's event loop."""

    def __init__(self, pools: Pools, standby: Standby) -> None:
        self._pools, self._standby = pools, standby
        self._starting: collections.Counter[Pool] = collections.Counter()
        self._tasks: dict[Pool, set[asyncio.Task[list[Member]]]] = collections.defaultdict(set)

    @property
    def starting(self) -> Mapping[Pool, int]:
        """How many, by pool."""
        return dict(self._starting)

    def give_up(self, pool: Pool) -> None:
        """The pool is asked for another size: whoever waits for members of it hears so."""
        for task in self._tasks[pool]:
            task.cancel()

    async def members(self, pool: Pool, count: int) -> list[Member]:
        """Loaded, from those on standby and new ones; none are left if it is cancelled.

        Raises: OctetError, also if the pool is asked for another size meanwhile.
        """
        self._starting[pool] += count
        task = asyncio.create_task(self.unless_stopped(pool, count))
        self._tasks[pool].add(task)
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            if not task.cancel() and task.exception() is None:
                for member in task.result():
                    self._pools.end(member)
            raise
        finally:
            self._tasks[pool].discard(task)
            self._starting[pool] -= count
        if task.cancelled():
            raise ChangeRefusedError(f"the {pool} pool was asked for another size before its processes were ready")
        return task.result()

    async def unless_stopped(self, pool: Pool, count: int) -> list[Member]:
        """The same, whatever else the pool is asked for. Raises: OctetError."""
        taken = await self._standby.take(pool, count)
        try:
            return taken + (await self._standby.start(pool, count - len(taken)) if len(taken) < count else [])
        except BaseException:
            for member in taken:
                self._pools.end(member)
            raise
