"""The router service as a Ray actor: it asks the shards for their counts, and answers for the whole cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from cluster.plan import ServingPlan
from router.placement import Placement
from router.service import LayerLoad, RouterService

_ASK_S = 5.0


class Router:
    def __init__(self, plan: ServingPlan) -> None:
        self._service = RouterService(plan.placement, plan.epoch)
        self._shards: Sequence[Any] = ()

    async def watch(self, shards: Sequence[Any]) -> None:
        """Take telemetry from these `ExpertShard` handles, in order of shard."""
        self._shards = shards

    async def ping(self) -> None:
        """Answered as long as the service's event loop runs."""

    async def placement(self) -> Placement:
        return self._service.placement

    async def layer_loads(self) -> list[LayerLoad]:
        """Tokens by layer and expert. A shard that does not answer in time counts as it last did."""
        asked = [asyncio.wait_for(shard.counts.remote(), _ASK_S) for shard in self._shards]
        for number, counts in enumerate(await asyncio.gather(*asked, return_exceptions=True)):
            if isinstance(counts, dict):
                self._service.record(number, counts)
        return self._service.layer_loads()
