"""Who is lost: by Ray's word that a process has died, by what members say of themselves, and by their silence."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable

import ray

from cluster.actors import answer_of
from cluster.control.pools import Member
from cluster.control.silence import Silence
from cluster.members import Endpoint, MemberStatus, Pool
from cluster.workers.process import is_idle
from octet.config import HealthConfig
from octet.ids import WorkerId
from octet.pulse import Pulses

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Who is told of what the watch finds. Called in the controller's event loop; they return at once."""

    lost: Callable[[WorkerId, str], None]
    """A member is of no use any more, and why. Once of each."""
    stranded: Callable[[WorkerId, str], None]
    """An attention worker has no lane, though no shard is lost."""
    severed: Callable[[WorkerId, WorkerId], None]
    """The KV channel between two workers is broken, though neither is lost."""


class Watch:
    """Belongs to the controller's event loop."""

    def __init__(
        self,
        config: HealthConfig,
        most_without_lane_s: float,
        findings: Findings,
        endpoint: Callable[[WorkerId], Endpoint | None] = lambda worker_id: None,
        here: str = "",
    ) -> None:
        """
        Args:
            most_without_lane_s: how long an attention worker may wait for another lane; one that has been passed over
                would wait for ever.
            endpoint: of a member that is watched; one without a pulse is judged by its answers alone.
            here: the id of this node: what runs on it can be looked at.
        """
        self._config, self._most_without_lane_s = config, most_without_lane_s
        self._findings, self._endpoint, self._here = findings, endpoint, here
        self._tasks: dict[WorkerId, tuple[Member, asyncio.Task[None]]] = {}
        self._looks: dict[Pool, asyncio.Event] = {}
        self._pulses = Pulses()
        self._silence = Silence(config, asyncio.get_running_loop().time())
        self._beating = asyncio.get_running_loop().create_task(self._beat())

    def set(self, members: Iterable[Member]) -> None:
        """Watch these, and no others."""
        wanted = {member.worker_id: member for member in members}
        for worker_id in self._tasks.keys() - wanted.keys():
            self._tasks.pop(worker_id)[1].cancel()
        for worker_id in wanted.keys() - self._tasks.keys():
            member = wanted[worker_id]
            self._tasks[worker_id] = (member, asyncio.get_running_loop().create_task(self._keep_watch(member)))
        self._attend()

    def look_at(self, pool: Pool) -> None:
        """There is reason to believe that a member of this pool is lost."""
        self._looks.setdefault(pool, asyncio.Event()).set()

    def late(self) -> dict[WorkerId, float]:
        """See `Silence.late`."""
        return self._silence.late()

    def close(self) -> None:
        self._beating.cancel()
        for _, task in self._tasks.values():
            task.cancel()
        self._tasks.clear()
        self._pulses.close()

    def _attend(self) -> None:
        found = {worker_id: self._endpoint(worker_id) for worker_id in self._tasks}
        pulses = {worker_id: endpoint.pulse for worker_id, endpoint in found.items() if endpoint and endpoint.pulse}
        self._silence.keep({worker_id: worker_id in pulses for worker_id in found})
        self._pulses.keep(pulses)

    def _declare(self, worker_id: WorkerId, reason: str) -> None:
        """It is lost; nobody hears of it again."""
        _, task = self._tasks.pop(worker_id)
        if task is not asyncio.current_task():
            task.cancel()
        self._attend()
        self._findings.lost(worker_id, reason)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._config.beat_s)
            idle = {worker_id: self._is_idle(worker_id) for worker_id in self._silence.unanswered()}
            felt = self._pulses.beat()
            for worker_id, reason in self._silence.judge(asyncio.get_running_loop().time(), felt, idle).items():
                self._declare(worker_id, reason)

    def _is_idle(self, worker_id: WorkerId) -> bool:
        endpoint = self._endpoint(worker_id)
        return endpoint is not None and endpoint.node_id == self._here and is_idle(endpoint.pid)

    async def _keep_watch(self, member: Member) -> None:
        """Until it is lost. A process that stops as it was asked to is not watched any more by then."""
        death = asyncio.ensure_future(self._death(member))
        uselessness = asyncio.ensure_future(self._uselessness(member))
        try:
            done, _ = await asyncio.wait((death, uselessness), return_when=asyncio.FIRST_COMPLETED)
            reason = next(iter(done)).result()
        finally:
            death.cancel()
            uselessness.cancel()
        self._declare(member.worker_id, reason)

    async def _death(self, member: Member) -> str:
        try:
            await answer_of(lambda: member.actor.lifeline.remote())
        except ray.exceptions.RayActorError as error:
            return f"its process is gone ({type(error).__name__})"
        except ray.exceptions.RayError as error:
            return f"Ray has lost it ({type(error).__name__})"
        return "it has stopped by itself"

    async def _uselessness(self, member: Member) -> str:
        """Why a process that answers is of no use."""
        look = self._looks.setdefault(member.pool, asyncio.Event())
        now_s = asyncio.get_running_loop().time
        with_lane_s = whole_s = now_s()
        while True:
            try:
                status: MemberStatus = await answer_of(lambda: member.actor.status.remote())
            except ray.exceptions.RayError as error:
                return f"its process is gone ({type(error).__name__})"
            self._silence.answered(member.worker_id)
            if status.state == "FAILED":
                return status.reason
            if status.state != "WAITING":
                with_lane_s = now_s()
            elif now_s() - with_lane_s > self._most_without_lane_s:
                return f"it has had no lane for {self._most_without_lane_s} s: {status.reason}"
            elif now_s() - with_lane_s > self._nobody_is_lost_s:
                self._findings.stranded(member.worker_id, status.reason)
            if not status.severed:
                whole_s = now_s()
            elif now_s() - whole_s > self._nobody_is_lost_s:
                whole_s = now_s()
                for peer in status.severed:
                    self._findings.severed(member.worker_id, peer)
            try:
                async with asyncio.timeout(self._config.period_s):
                    await look.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(0)
            look.clear()

    @property
    def _nobody_is_lost_s(self) -> float:
        """A break that is older than this was not the death of who is at its other end: that would be known by now."""
        return 2 * self._config.silent_s
