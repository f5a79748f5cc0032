"""Who is lost: by Ray's word that a process has died, by what members say of themselves, and by their silence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import ray

from cluster.members import MemberStatus, Pool
from cluster.pools import Member
from octet.config import HealthConfig
from octet.ids import WorkerId

_log = logging.getLogger(__name__)


class Watch:
    """Tells once of each member that is lost. Belongs to the controller's event loop."""

    def __init__(
        self, config: HealthConfig, most_without_lane_s: float, on_lost: Callable[[WorkerId, str], None]
    ) -> None:
        """
        Args:
            most_without_lane_s: how long an attention worker may wait for another lane; one that has been passed over
                would wait for ever.
        """
        self._config, self._most_without_lane_s, self._on_lost = config, most_without_lane_s, on_lost
        self._tasks: dict[WorkerId, tuple[Member, asyncio.Task[None]]] = {}
        self._looks: dict[Pool, asyncio.Event] = {}

    def add(self, member: Member) -> None:
        if member.worker_id not in self._tasks:
            task = asyncio.get_running_loop().create_task(self._keep_watch(member))
            self._tasks[member.worker_id] = (member, task)

    def set(self, members: Iterable[Member]) -> None:
        """Watch these, and no others."""
        wanted = {member.worker_id: member for member in members}
        for worker_id in self._tasks.keys() - wanted.keys():
            self._tasks.pop(worker_id)[1].cancel()
        for member in wanted.values():
            self.add(member)

    def look_at(self, pool: Pool) -> None:
        """There is reason to believe that a member of this pool is lost."""
        self._looks.setdefault(pool, asyncio.Event()).set()

    def close(self) -> None:
        for _, task in self._tasks.values():
            task.cancel()
        self._tasks.clear()

    async def _keep_watch(self, member: Member) -> None:
        """Until it is lost. A process that stops as it was asked to is not watched any more by then."""
        death = asyncio.ensure_future(self._death(member))
        silence = asyncio.ensure_future(self._silence(member))
        try:
            done, _ = await asyncio.wait((death, silence), return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
        finally:
            death.cancel()
            silence.cancel()
        self._tasks.pop(member.worker_id, None)
        self._on_lost(member.worker_id, reason)

    async def _death(self, member: Member) -> str:
        try:
            await member.actor.lifeline.remote()
        except ray.exceptions.RayActorError as error:
            return f"its process is gone ({type(error).__name__})"
        except ray.exceptions.RayError as error:
            return f"Ray has lost it ({type(error).__name__})"
        return "it has stopped by itself"

    async def _silence(self, member: Member) -> str:
        """Why a process that lives is of no use."""
        look = self._looks.setdefault(member.pool, asyncio.Event())
        now_s = asyncio.get_running_loop().time
        with_lane_s = now_s()
        while True:
            try:
                async with asyncio.timeout(self._config.timeout_s):
                    status: MemberStatus = await member.actor.status.remote()
            except TimeoutError:
                return f"no sign of life within {self._config.timeout_s} s"
            except ray.exceptions.RayError as error:
                return f"its process is gone ({type(error).__name__})"
            if status.state == "FAILED":
                return status.reason
            if status.state != "WAITING":
                with_lane_s = now_s()
            elif now_s() - with_lane_s > self._most_without_lane_s:
                return f"it has had no lane for {self._most_without_lane_s} s: {status.reason}"
            try:
                async with asyncio.timeout(self._config.period_s):
                    await look.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(0)
            look.clear()
