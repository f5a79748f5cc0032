"""Members that are slow: named in the status, asked for less where others hold the same experts, and parted with."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from cluster.control.expert_moves import ExpertMoves
from cluster.control.membership import Membership
from cluster.control.slowness import Signs, Slowness
from cluster.members import POOLS, Pool
from octet.config import HealthConfig
from octet.errors import OctetError
from octet.ids import WorkerId
from router.telemetry_window import TelemetryWindow

_log = logging.getLogger(__name__)

_LOOK_S = 1.0
WINDOW_S = 5.0
"""What is looked at, of the telemetry."""
_LEAST_FRAMES = 50.0
"""Within the window, of a shard that is compared with others."""


class SlowMembers:
    """Belongs to the controller's event loop."""

    def __init__(
        self,
        config: HealthConfig,
        membership: Membership,
        moves: ExpertMoves,
        late: Callable[[], Mapping[WorkerId, float]],
        telemetry: Callable[[], Awaitable[TelemetryWindow | None]],
        on_lost: Callable[[WorkerId, str], None],
    ) -> None:
        """
        Args:
            late: of each member's beats, the share at which no pulse was felt.
            telemetry: of the last `WINDOW_S` seconds.
            on_lost: told of a member that is evicted.
        """
        self._membership, self._moves, self._late = membership, moves, late
        self._telemetry, self._on_lost = telemetry, on_lost
        self._policies: dict[Pool, Slowness] = {pool: Slowness(config) for pool in POOLS}
        self.slow: dict[WorkerId, str] = {}
        """Who is slow now, and what is slow about it."""

    async def run(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
            except OctetError as error:
                _log.warning("a slow shard is asked for as much as before: %s", error)

    async def _look(self) -> None:
        now_s, late, window = asyncio.get_running_loop().time(), self._late(), await self._telemetry()
        service_s = service_times(window) if window is not None else {}
        slow: dict[WorkerId, str] = {}
        evicted: dict[WorkerId, str] = {}
        for pool, policy in self._policies.items():
            members = [member.worker_id for member in self._membership.pool(pool)]
            signs = {each: Signs(late=late.get(each, 0.0), service_s=service_s.get(each)) for each in members}
            verdict = policy.judge(now_s, signs)
            slow |= verdict.slow
            evicted |= verdict.evicted
        for worker_id in slow.keys() - self.slow.keys():
            _log.warning("%s is slow: %s", worker_id, slow[worker_id])
        self.slow = slow
        for worker_id, why in evicted.items():
            self._on_lost(worker_id, why)
        shunned = frozenset(slow.keys() & set(self._membership.routing.shards)) - evicted.keys()
        if shunned != self._membership.routing.shunned and not evicted:
            await self._moves.shun(shunned, "; ".join(f"{each}: {slow[each]}" for each in sorted(shunned)))


def service_times(window: TelemetryWindow) -> dict[WorkerId, float]:
    """What each shard takes for an expert that a frame hits, in seconds; of those that have served enough."""
    return {
        shard.worker_id: shard.busy_share / (shard.frames_per_s * max(1.0, shard.activated_experts))
        for shard in window.shards
        if shard.frames_per_s * window.duration_s >= _LEAST_FRAMES
    }
