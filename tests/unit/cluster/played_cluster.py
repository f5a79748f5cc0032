"""A cluster whose members and services are played, and the changes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cluster.control.changes import Changes
from cluster.control.membership import Membership
from cluster.control.pools import Member
from octet.ids import WorkerId
from router.proposal import make_proposal
from tests.unit.cluster.played import PLAN
from tests.unit.cluster.played_actors import Played, member, serving


class Pools:
    """Says whose processes were ended."""

    def __init__(self) -> None:
        self.ended: list[WorkerId] = []

    def end(self, one: Member) -> None:
        self.ended.append(one.worker_id)


class Router(Played):
    """Proposes that experts of the hottest shard change places with others; `level` says that this brings nothing."""

    level, hot = False, 4

    async def _answer(self, method: str, *args: Any) -> Any:
        if method != "propose":
            return await super()._answer(method, *args)
        self.asked.append((method, args))
        current, epoch, num_redundant, _, _, _, domains, resized, held_out = args
        loads = np.ones((len(current.placement.layers), PLAN.model.n_routed_experts))
        judged = loads if self.level and held_out else None
        loads = loads.copy()
        loads[:, : self.hot] = 100.0
        config = PLAN.config.balancing
        return make_proposal(
            current, epoch, loads, config, num_redundant, 1, domains=domains, resized=resized, judged_LE=judged
        )


class Services:
    def __init__(self, router: Played, frontend: Played) -> None:
        self.router, self.frontend, self.port = router, frontend, 1
        self.given_up = 0

    async def replace_frontend(self) -> str:
        return "tcp://h:9"

    async def serve(self, *args: object) -> None:
        await self.frontend.serve.remote(*args)

    def give_up_frontend(self) -> None:
        self.given_up += 1


class Cluster:
    """Two members of each pool, and what ends and tells them."""

    def __init__(self, actors: dict[str, Played], membership: Membership, services: Services) -> None:
        self.actors, self.membership, self.services = actors, membership, services
        self.pools, self.watched = Pools(), list[WorkerId]()
        any_pools: Any = self.pools
        any_services: Any = services
        self.changes = Changes(PLAN, any_pools, membership, any_services, self._watch)

    def _watch(self, members: Sequence[Member]) -> None:
        self.watched = [one.worker_id for one in members]


async def cluster_of(*special: Played, router: Played | None = None, frontend: Played | None = None) -> Cluster:
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1", *PLAN.routing.shards]
    actors = {name: Played(name) for name in names} | {actor.worker_id: actor for actor in special}
    membership = await serving(*(member(name.partition("-")[0], actors[name]) for name in names))  # type: ignore[arg-type]
    services = Services(router or Router("router"), frontend or Played("frontend-0"))
    return Cluster(actors, membership, services)


async def until(so: Callable[[], bool]) -> None:
    """Within a few turns of the loop."""
    for _ in range(10_000):
        if so():
            return
        await asyncio.sleep(0)
    assert so()


async def at_rest(cluster: Cluster) -> None:
    """Until no change is gone through with."""
    await until(lambda: not cluster.changes.log._going_through)


async def on_standby(cluster: Cluster, *names: str) -> list[Played]:
    """Processes of the decode pool that are loaded."""
    actors = [Played(name) for name in names]
    members = [member("decode", actor) for actor in actors]
    await cluster.membership.reach(members)
    cluster.changes.standby.take_over(members)
    return actors
