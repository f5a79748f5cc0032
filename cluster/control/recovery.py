"""What follows when members are lost: the cluster goes on without them, and others take their places."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from cluster.members import Pool
from octet.errors import OctetError
from octet.ids import WorkerId

_log = logging.getLogger(__name__)

_RETRY_S = 1.0
_LONGEST_RETRY_S = 15.0
_PATIENT_TRIES = 3
"""What has failed so often, one time after the other, will hardly be better a second later."""


class Mender(Protocol):
    """What recovery does to the cluster: `Changes`."""

    async def recover(self, lost: Mapping[WorkerId, str]) -> None:
        """Go on without these. Raises: OctetError if that is not possible yet."""

    async def replenish(self, pool: Pool, size: int, reason: str) -> None:
        """Let a pool have at least so many members. Raises: OctetError."""


class Recovery:
    """Belongs to the controller's event loop.

    A pool that cannot be made up for, because no node has room, holds up neither the other pools nor what has to be
    done about the next loss.
    """

    def __init__(self, mender: Mender, short: Callable[[], Mapping[Pool, int]], retry_s: float = _RETRY_S) -> None:
        """
        Args:
            short: the sizes of the pools that have fewer members than they should.
        """
        self._mender, self._short, self._retry_s = mender, short, retry_s
        self._lost: dict[WorkerId, str] = {}
        self._failures = 0
        """In a row."""
        self._more = asyncio.Event()
        self._replacing: dict[Pool, asyncio.Task[None]] = {}

    def __contains__(self, worker_id: object) -> bool:
        """Whether it is to be done without."""
        return worker_id in self._lost

    @property
    def reason(self) -> str:
        """Who is to be done without, and why."""
        return "; ".join(f"{worker_id}: {why}" for worker_id, why in self._lost.items())

    @property
    def pause_s(self) -> float:
        """Until the next try, if nobody else is lost."""
        return min(self._retry_s * 2.0 ** max(0, self._failures - _PATIENT_TRIES), _LONGEST_RETRY_S)

    def add(self, worker_id: WorkerId, reason: str) -> None:
        self._lost[worker_id] = reason
        self._more.set()

    async def run(self) -> None:
        """Until nobody is lost and every pool has its size. Raises nothing but by being cancelled."""
        replaced = ""
        try:
            while self._lost or self._short():
                self._more.clear()
                if self._lost:
                    replaced = ", ".join(sorted(self._lost))
                    await self._go_on()
                else:
                    await self._replace(f"to replace {replaced}")
        finally:
            for task in self._replacing.values():
                task.cancel()
            # The next loss finds no cancelled task here, which would look as if its own had ended.
            self._replacing.clear()

    async def _go_on(self) -> None:
        lost = dict(self._lost)
        try:
            await self._mender.recover(lost)
        except Exception as error:
            _say("no recovery yet", error)
            self._failures += 1
            with contextlib.suppress(TimeoutError):
                # Another loss may be why it failed.
                await asyncio.wait_for(self._more.wait(), self.pause_s)
            return
        self._failures = 0
        self._lost = {worker_id: why for worker_id, why in self._lost.items() if worker_id not in lost}

    async def _replace(self, reason: str) -> None:
        """Until one pool is done, or another member is lost; what else is under way goes on."""
        for pool, size in self._short().items():
            if pool not in self._replacing:
                self._replacing[pool] = asyncio.create_task(self._mender.replenish(pool, size, reason))
        more = asyncio.create_task(self._more.wait())
        await asyncio.wait({more, *self._replacing.values()}, return_when=asyncio.FIRST_COMPLETED)
        more.cancel()
        for pool in [pool for pool, task in self._replacing.items() if task.done()]:
            try:
                self._replacing.pop(pool).result()
            except Exception as error:
                _say(f"the {pool} pool is not complete yet", error)
                await asyncio.sleep(self._retry_s)


def _say(what: str, error: Exception) -> None:
    """Whatever it is, recovery goes on: without it, no later loss would be dealt with either."""
    _log.warning("%s: %s", what, error, exc_info=None if isinstance(error, OctetError) else error)
