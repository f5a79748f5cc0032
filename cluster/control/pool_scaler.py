"""The autoscaler of a running cluster: what its loop sees, and what it can do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import cast

from cluster.actors import call
from cluster.autoscaling.autoscaler import REDUNDANCY, Fleet, PoolDecision
from cluster.autoscaling.autoscaling_loop import AutoscalingLoop
from cluster.autoscaling.signals import Prospect, Signals
from cluster.control.changes import Changes
from cluster.control.membership import Membership
from cluster.control.observe import observe
from cluster.control.services import Services
from cluster.frontend.request_meter import RequestLoad
from cluster.members import POOLS, Pool
from cluster.plan import ServingPlan
from router.telemetry_window import TelemetryWindow

_ANSWER_S = 10.0

Scale = Callable[[Pool, int, str], Awaitable[None]]


class PoolScaler:
    """Belongs to the controller's event loop."""

    def __init__(
        self,
        plan: ServingPlan,
        membership: Membership,
        changes: Changes,
        services: Services,
        scale: Scale,
    ) -> None:
        """
        Args:
            scale: brings a pool to a size, for a reason. Raises: OctetError.
        """
        self._plan, self._membership, self._changes = plan, membership, changes
        self._services, self._scale = services, scale
        config = plan.config
        fleet = Fleet(
            gpus_per_member={pool: getattr(config.pools, pool).num_gpus or 1 for pool in POOLS},
            max_batch=config.decode.max_batch,
        )
        self.loop = AutoscalingLoop(config.autoscaler, fleet, self._observe, self._act)

    async def _observe(self) -> Signals:
        """Raises: OctetError if the router service or the frontend does not answer, or nothing is heard of a pool."""
        period_s = self._plan.config.autoscaler.look_back_period_s
        asked = self._services.router.telemetry.remote(period_s, fresh=True)
        window: TelemetryWindow = await call("the router", asked, _ANSWER_S)
        requests: RequestLoad = await call("the frontend", self._services.frontend.request_load.remote(), _ANSWER_S)
        draining = self._changes.announcements.draining
        ages_s = {worker: age_s for worker, age_s in self._membership.ages_s().items() if worker not in draining}
        num_shards = len(self._membership.routing.shards)
        pool, capacity = self._plan.config.pools.experts, self._membership.routing.placement.slots_per_shard
        fit = pool.slots_per_shard or capacity
        redundant = self._changes.moves.num_redundant
        prospects: tuple[Prospect, ...] = await call(
            "the router", self._services.router.prospects.remote(num_shards, redundant, fit), _ANSWER_S
        )
        return observe(
            window,
            requests,
            ages_s,
            self._changes.sizes.starting,
            Counter(cast("Pool", worker.partition("-")[0]) for worker in draining),
            redundant,
            fit,
            prospects,
        )

    async def _act(self, one: PoolDecision) -> None:
        """Raises: OctetError."""
        if one.pool == REDUNDANCY:
            await self._changes.moves.set_redundancy(one.target, one.reason)
        else:
            await self._scale(cast("Pool", one.pool), one.target, one.reason)
