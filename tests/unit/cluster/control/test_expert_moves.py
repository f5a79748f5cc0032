"""Experts that move between shards which are played."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from cluster.members import Endpoint
from octet.errors import UnavailableError
from octet.ids import WorkerId
from router.placement import EMPTY
from router.routing import Routing
from tests.unit.cluster.played import PATIENT_S, PLAN, soon
from tests.unit.cluster.played_actors import Played
from tests.unit.cluster.played_cluster import Router, cluster_of


async def test_experts_that_move_arrive_also_where_nobody_waits_for_it_any_more() -> None:
    slow = Played("decode-0", hangs_at=("adopt",))
    cluster = await cluster_of(slow)
    before = cluster.membership.routing
    asking = asyncio.create_task(cluster.changes.moves.rebalance(dry_run=False, reason="for a test"))
    await asyncio.wait_for(slow.asked_in_vain.wait(), PATIENT_S)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    slow.may_go_on.set()
    for _ in range(100):
        if not cluster.changes.log.busy:
            break
        await asyncio.sleep(0.01)
    assert cluster.membership.adopting is None
    assert cluster.membership.routing.placement.version > before.placement.version
    assert all("retire" in cluster.actors[shard].calls for shard in cluster.membership.routing.shards)


async def test_what_is_prepared_for_a_change_that_is_given_up_is_given_up_by_name() -> None:
    first, second = PLAN.routing.shards[:2]
    slow = Played(first, hangs_at=("prepare",))
    cluster = await cluster_of(slow, Played(second, hangs_at=("prepare",)))
    asking = asyncio.create_task(cluster.changes.moves.rebalance(dry_run=False, reason="for a test"))
    await asyncio.wait_for(slow.asked_in_vain.wait(), PATIENT_S)
    cluster.changes.interrupt(WorkerId("prefill-0"))
    with pytest.raises(UnavailableError, match="lost meanwhile"):
        await soon(asking)
    (attempt,) = (args[2] for method, args in slow.asked if method == "prepare")
    (given_up,) = (args[1] for method, args in slow.asked if method == "retire")
    assert given_up == attempt != ""


def num_filled(routing: Routing) -> int:
    return int((routing.placement.physical_to_logical != EMPTY).sum())


async def test_redundant_experts_are_given_back_though_the_loads_gain_nothing_by_it() -> None:
    router = Router("router")
    router.hot = 1
    cluster = await cluster_of(router=router)
    before = cluster.membership.routing
    await soon(cluster.changes.moves.set_redundancy(16, "for a test"))
    grown = cluster.membership.routing
    assert num_filled(grown) > num_filled(before)
    await soon(cluster.changes.moves.set_redundancy(0, "for a test"))
    assert num_filled(cluster.membership.routing) == num_filled(before)
    assert cluster.membership.routing.placement.version > grown.placement.version
    assert cluster.changes.moves.num_redundant == 0
    assert [change.kind for change in cluster.changes.log.records] == ["rebalance"] * 2


async def test_redundancy_that_cannot_be_had_is_as_it_was() -> None:
    cluster = await cluster_of(router=Router("router"))
    before = cluster.changes.moves.num_redundant
    cluster.changes.interrupt(WorkerId("prefill-0"))
    with pytest.raises(UnavailableError):
        await soon(cluster.changes.moves.set_redundancy(16, "for a test"))
    assert cluster.changes.moves.num_redundant == before
    assert cluster.changes.log.under_way == ""
    assert not cluster.changes.log.busy


async def test_experts_stay_where_a_plan_gains_nothing_by_loads_that_it_was_not_made_for() -> None:
    router = Router("router")
    cluster = await cluster_of(router=router)
    before, router.level = cluster.membership.routing, True
    proposal = await soon(cluster.changes.moves.rebalance(dry_run=False, min_gain=0.05, reason="for a test"))
    assert not proposal.pays(0.05)
    assert cluster.membership.routing == before
    router.level = False
    proposal = await soon(cluster.changes.moves.rebalance(dry_run=False, min_gain=0.05, reason="for a test"))
    assert proposal.pays(0.05)
    assert cluster.membership.routing.placement.version > before.placement.version


@pytest.mark.parametrize(("nodes", "domains"), [("nn", None), ("nm", [1, 0])])
async def test_the_router_service_hears_which_shards_share_a_node(nodes: str, domains: list[int] | None) -> None:
    router = Router("router")
    shards = [OnNode(shard, node) for shard, node in zip(PLAN.routing.shards, nodes, strict=True)]
    cluster = await cluster_of(*shards, router=router)
    await soon(cluster.changes.moves.rebalance(dry_run=True, reason="for a test"))
    ((_, args),) = (asked for asked in router.asked if asked[0] == "propose")
    assert args[6] == (None if domains is None else dict(zip(PLAN.routing.shards, domains, strict=True)))


class OnNode(Played):
    def __init__(self, worker_id: str, node: str) -> None:
        super().__init__(worker_id)
        self.node = node

    async def _answer(self, method: str, *args: Any) -> Any:
        answer = await super()._answer(method, *args)
        return dataclasses.replace(answer, node_id=self.node) if isinstance(answer, Endpoint) else answer
