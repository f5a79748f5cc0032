"""The router service without Ray: members are objects whose calls can be awaited."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable

import numpy as np
import pytest

from cluster.planning import make_plan
from cluster.workers.router_actor import Router
from octet.config import load_config
from octet.counters import FrameCounters
from octet.ids import WorkerId
from router.telemetry_samples import ShardSample

PLAN = make_plan(load_config(overrides=["telemetry.step_s=0.2", "telemetry.silent_s=1"]))
PLACEMENT = PLAN.routing.placement
SHAPE = (len(PLACEMENT.layers), PLACEMENT.num_experts)


class FakeShard:
    """Serves one token more, with every expert, each time it is asked."""

    def __init__(self, name: str) -> None:
        self.name, self.asked = WorkerId(name), 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.telemetry = self

    def remote(self) -> Awaitable[ShardSample]:
        return self._answer()

    async def _answer(self) -> ShardSample:
        self.asked += 1
        await self.may_answer.wait()
        return ShardSample(
            worker_id=self.name,
            incarnation=1,
            uptime_s=float(self.asked),
            tokens_LE=np.full(SHAPE, self.asked),
            activated=0,
            frames=FrameCounters(),
            lanes={},
            waiting=0,
        )


@pytest.fixture
async def router() -> AsyncIterator[Router]:
    router = Router(PLAN)
    yield router
    await router.stop()


def members(*shards: FakeShard) -> dict[WorkerId, FakeShard]:
    return {shard.name: shard for shard in shards}


async def test_members_are_read_step_by_step(router: Router) -> None:
    shard = FakeShard("experts-0")
    await router.watch(PLAN.routing, members(shard))
    for _ in range(200):
        if shard.asked >= 4:
            break
        await asyncio.sleep(0.05)
    window = await router.telemetry()
    assert window.total_LE.min() >= 3
    assert [seen.worker_id for seen in window.shards] == ["experts-0"]


async def test_fresh_telemetry_has_what_was_counted_until_now(router: Router) -> None:
    shard = FakeShard("experts-0")
    await router.watch(PLAN.routing, members(shard))
    window = await router.telemetry(fresh=True)
    assert (window.loads_LE == shard.asked).all()


async def test_those_who_ask_at_once_share_a_reading_that_began_later(router: Router) -> None:
    shard = FakeShard("experts-0")
    shard.may_answer.clear()
    await router.watch(PLAN.routing, members(shard))
    asking = [asyncio.create_task(router.telemetry(fresh=True)) for _ in range(20)]
    await asyncio.sleep(0.05)
    shard.may_answer.set()
    windows = await asyncio.gather(*asking)
    assert shard.asked <= 3
    assert all(window.total_LE.min() >= 1 for window in windows)
    assert windows[-1].total_LE.min() >= 2


async def test_a_silent_member_delays_a_step_by_its_deadline_at_most(router: Router) -> None:
    silent, other = FakeShard("experts-0"), FakeShard("experts-1")
    silent.may_answer.clear()
    await router.watch(PLAN.routing, members(silent, other))
    begun_s = time.monotonic()
    while other.asked < 5:
        await asyncio.sleep(0.02)
        assert time.monotonic() - begun_s < 20
    window = await router.telemetry()
    assert [seen.worker_id for seen in window.shards] == ["experts-1"]
    assert window.total_LE.min() >= 4


async def test_a_pause_is_followed_by_the_newest_and_not_by_a_reading_for_each_step_of_it() -> None:
    step_s, num_steps = 0.1, 5
    router, shard = Router(make_plan(load_config(overrides=[f"telemetry.step_s={step_s}"]))), FakeShard("experts-0")
    await router.watch(PLAN.routing, members(shard))
    await router.telemetry(fresh=True)
    asyncio.get_running_loop().call_soon(time.sleep, num_steps * step_s)
    await asyncio.sleep(0)
    asked, resumed_s = shard.asked, time.monotonic()
    while shard.asked < asked + 3:
        await asyncio.sleep(0.001)
        # One that was due in the pause, and one at its end.
        assert shard.asked - asked <= 2 + (time.monotonic() - resumed_s) / step_s
        assert time.monotonic() - resumed_s < 20
    window = await router.telemetry(fresh=True)
    assert (window.total_LE == shard.asked).all()
    await router.stop()


async def test_what_a_leaving_member_counted_last_is_kept(router: Router) -> None:
    leaving, staying = FakeShard("experts-0"), FakeShard("experts-1")
    await router.watch(PLAN.routing, members(leaving, staying))
    await router.telemetry(fresh=True)
    asked = leaving.asked
    await router.watch(PLAN.routing, members(staying))
    window = await router.telemetry()
    assert [seen.worker_id for seen in window.shards] == ["experts-1"]
    assert leaving.asked == asked + 1
    assert (window.total_LE == leaving.asked + staying.asked).all()


async def test_a_plan_is_judged_by_the_later_half_of_the_window_where_that_is_asked_for(router: Router) -> None:
    telemetry, begun_s, shard = router._service.telemetry, time.monotonic(), FakeShard("experts-0")
    tokens_LE = np.zeros(SHAPE, dtype=np.int64)
    for second, (busy, others) in enumerate([(1000, 0), (100, 100)], start=1):
        tokens_LE[:, : SHAPE[1] // 2] += busy
        tokens_LE[:, SHAPE[1] // 2 :] += others
        telemetry.record(begun_s + second, [dataclasses.replace(await shard._answer(), tokens_LE=tokens_LE.copy())])
    by_all = await router.propose(PLAN.routing, PLAN.routing.epoch, 0)
    held_out = await router.propose(PLAN.routing, PLAN.routing.epoch, 0, held_out=True)
    assert held_out.transition.fills
    assert held_out.relative_gain == 0 < by_all.relative_gain


async def test_with_the_nodes_of_the_shards_copies_go_to_another_node() -> None:
    plan = make_plan(load_config(overrides=["pools.experts.size=4", "balancing.two_domains=true"]))
    router, current = Router(plan), plan.routing
    domains = {shard: number // 2 for number, shard in enumerate(current.shards)}
    proposal = await router.propose(current, current.epoch, SHAPE[1], domains=domains)
    held = proposal.transition.target.placement.physical_to_logical.reshape(SHAPE[0], 2, -1)
    assert all(set(held_S[held_S >= 0].tolist()) == set(range(SHAPE[1])) for of_layer in held for held_S in of_layer)
