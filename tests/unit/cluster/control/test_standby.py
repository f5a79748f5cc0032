"""Processes on standby, played."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.control.member_status import member_status
from cluster.control.pools import Member
from cluster.control.standby import Standby
from cluster.members import Pool
from cluster.planning import make_plan
from octet.config import load_config
from octet.ids import WorkerId
from tests.unit.cluster.played import soon
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
