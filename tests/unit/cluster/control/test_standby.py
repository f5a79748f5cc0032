"""Processes on standby, played."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.control.member_status import member_status
from cluster.control.membership import Membership
from cluster.control.pools import Member
from cluster.control.standby import Standby
from cluster.members import Pool
from cluster.planning import make_plan
from octet.config import load_config
from octet.ids import WorkerId
from tests.unit.cluster.played import PATIENT_S, soon
from tests.unit.cluster.played_actors import Played, member, serving


class Pools:
    """Starts actors that are played."""

    def __init__(self) -> None:
        self.started: list[Played] = []
        self.ended: list[WorkerId] = []

    async def start(self, pool: Pool, count: int, timeout_s: float) -> list[Member]:
        new = [Played(f"{pool}-{len(self.started) + number}") for number in range(count)]
        self.started += new
        return [member(pool, actor) for actor in new]

    def end(self, one: Member) -> None:
        self.ended.append(one.worker_id)


async def test_one_that_is_lost_is_replaced_before_it_is_needed() -> None:
    pools = Pools()
    any_pools: Any = pools
    plan = make_plan(load_config(None, ["pools.decode.standby=2"]))
    standby = Standby(plan, any_pools, await serving(member("experts", Played("experts-0"))))
    await soon(standby.fill())
    assert [one.worker_id for one in standby.all()] == ["decode-0", "decode-1"]
    pools.started[0].refuses = ("status",)
    await soon(standby.fill())
    assert pools.ended == ["decode-0"]
    assert [one.worker_id for one in standby.all()] == ["decode-1", "decode-2"]


async def test_one_that_does_not_answer_is_silent_before_whoever_asks_for_all_gives_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.control.member_status._ANSWER_S", 0.05)
    status = await soon(member_status(member("decode", Played("decode-0", hangs_at=("status",)))))
    assert status.state == "SILENT"


class StrictPools(Pools):
    """As Ray: nothing is started in a group of no bundles."""

    async def start(self, pool: Pool, count: int, timeout_s: float) -> list[Member]:
        if count <= 0:
            raise ValueError("Bundles must be a non-empty list")
        return await super().start(pool, count, timeout_s)


async def prepared(*ready: Played) -> tuple[Standby, Pools]:
    """One process of the prefill and one of the decode pool is to be on standby."""
    pools = StrictPools()
    any_pools: Any = pools
    plan = make_plan(load_config(None, ["pools.prefill.standby=1", "pools.decode.standby=1"]))
    standby = Standby(plan, any_pools, Membership(plan, {}))
    standby.take_over([member("prefill", actor) for actor in ready])
    return standby, pools


async def test_one_that_is_taken_in_vain_is_on_standby_again() -> None:
    """Whoever waits for members is told that its pool is asked for another size."""
    first, second = Played("prefill-7"), Played("prefill-8", hangs_at=("status",))
    standby, pools = await prepared(first, second)
    taking = asyncio.create_task(standby.take("prefill", 2))
    await asyncio.wait_for(second.asked_in_vain.wait(), PATIENT_S)
    assert standby.all() == []
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert {one.worker_id for one in standby.all()} == {"prefill-7", "prefill-8"}
    assert pools.ended == []


async def test_one_that_is_lost_when_it_is_needed_is_ended_and_the_next_one_taken() -> None:
    lost, there = Played("prefill-7", refuses=("status",)), Played("prefill-8")
    standby, pools = await prepared(lost, there)
    taken = await soon(standby.take("prefill", 1))
    assert [one.worker_id for one in taken] == ["prefill-8"]
    assert pools.ended == ["prefill-7"]
    assert standby.all() == []


async def test_one_more_than_are_wanted_keeps_no_pool_from_being_filled() -> None:
    """One that was taken in vain comes back when another has been started in its place."""
    hung = Played("prefill-7", hangs_at=("status",))
    standby, pools = await prepared(hung)
    taking = asyncio.create_task(standby.take("prefill", 1))
    await asyncio.wait_for(hung.asked_in_vain.wait(), PATIENT_S)
    await soon(standby.fill())
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    hung.hangs_at = ()
    # Of what was started, the second is the decode worker.
    pools.started[1].refuses = ("status",)
    await soon(standby.fill())
    assert sorted(one.pool for one in standby.all()) == ["decode", "prefill", "prefill"]
    assert pools.ended == [pools.started[1].worker_id]
