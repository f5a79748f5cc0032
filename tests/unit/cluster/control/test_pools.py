"""Reserving room for members, without Ray: placement groups are ready when a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
import ray

import cluster.control.keeper
import cluster.control.pools
from cluster.control.controller_journal import NotedGroup
from cluster.control.pools import Berth, Member, Pools, group_sizes
from cluster.members import Pool
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import ChangeRefusedError, StartupError
from octet.ids import WorkerId

WAIT_S = 0.5


class Group:
    def __init__(self, bundles: list[dict[str, float]], name: str = "") -> None:
        self.bundles, self.name, self.room = bundles, name, False
        self.id = uuid.uuid4().bytes

    def wait(self, timeout_s: float) -> bool:
        if not self.room:
            time.sleep(0.02)
        return self.room


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """All that are not removed."""
    made: list[Group] = []

    def make(bundles: list[dict[str, float]], strategy: str, name: str) -> Any:
        assert "octet" in name, "it is known whose it is"
        made.append(Group(bundles, name))
        return made[-1]

    def remove(group: Group) -> None:
        # Ray does not mind that it is gone already.
        with contextlib.suppress(ValueError):
            made.remove(group)

    monkeypatch.setattr(cluster.control.pools, "placement_group", make)
    monkeypatch.setattr(cluster.control.keeper, "remove_placement_group", remove)
    monkeypatch.setattr(
        cluster.control.keeper,
        "placement_group_table",
        lambda: {each: {"name": each.name, "state": "CREATED"} for each in made},
    )
    monkeypatch.setattr(cluster.control.keeper, "group_of", lambda group: group)
    return made


async def until(happened: Callable[[], bool], patience_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + patience_s
    while not happened():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("count", "together", "sizes"),
    [(3, 3, [3]), (3, 0, [1, 1, 1]), (3, 1, [1, 1, 1]), (3, 2, [2, 1]), (1, 5, [1]), (0, 2, [])],
)
def test_only_members_that_stay_share_a_group(count: int, together: int, sizes: list[int]) -> None:
    assert group_sizes(count, together) == sizes


async def test_where_no_room_comes_nothing_stays_reserved_and_the_error_says_what_was_wanted(
    groups: list[Group],
) -> None:
    pools = Pools(make_plan(load_config(None, ["pools.decode.num_cpus=3"])), None)
    starting = asyncio.create_task(pools.start("decode", 2, WAIT_S))
    await until(lambda: len(groups) == 2)
    assert [group.bundles for group in groups] == [[{"CPU": 3.0}]] * 2
    assert pools.waiting_for == "2 × {'CPU': 3.0} for the decode pool"
    groups[0].room = True
    with pytest.raises(
        ChangeRefusedError, match=r"no node had room within 0\.5 s, and none came, for 2 × {'CPU': 3\.0}"
    ):
        await starting
    await until(lambda: groups == [])
    assert pools.waiting_for == ""


async def test_what_is_given_up_leaves_no_group(groups: list[Group]) -> None:
    pools = Pools(make_plan(load_config(None, ["pools.experts.strategy=STRICT_SPREAD"])), None)
    starting = asyncio.create_task(pools.start("experts", 2))
    await until(lambda: groups != [])
    # A strict strategy is one of a group.
    assert [len(group.bundles) for group in groups] == [2]
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await until(lambda: groups == [])


async def test_what_ray_may_have_reserved_is_given_back_where_its_answer_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: dict[str, dict[str, str]] = {"other": {"name": "octet/other/1", "state": "CREATED"}}

    def lose(bundles: list[dict[str, float]], strategy: str, name: str) -> Any:
        made[str(len(made))] = {"name": name, "state": "CREATED"}
        raise ray.exceptions.RaySystemError("the answer was lost")

    monkeypatch.setattr(cluster.control.pools, "placement_group", lose)
    monkeypatch.setattr(cluster.control.keeper, "placement_group_table", lambda: dict(made))
    monkeypatch.setattr(cluster.control.keeper, "group_of", lambda group: group)
    monkeypatch.setattr(cluster.control.keeper, "remove_placement_group", made.pop)
    pools = Pools(make_plan(load_config()), None)
    with pytest.raises(StartupError, match="did not say"):
        await pools.start("decode", 2, 5.0)
    assert list(made) == ["other"]
    assert pools.groups == ()
    assert pools.waiting_for == ""


async def test_a_place_that_is_free_is_waited_for_where_its_node_is_gone(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray looks for another node for it."""
    left = Group([{"CPU": 1.0}])
    monkeypatch.setattr(cluster.control.pools, "group_of", lambda group: left)
    pools = Pools(make_plan(load_config(None, ["pools.decode.num_cpus=1"])), None)
    pools.take_over({}, [NotedGroup(group="00", pool="decode", size=1)], [])
    starting = asyncio.create_task(pools.start("decode", 1, WAIT_S))
    await until(lambda: pools.waiting_for != "")
    assert groups == [], "none is asked for beside it"
    assert pools.waiting_for == "1 × {'CPU': 1.0} for the decode pool"
    with pytest.raises(ChangeRefusedError, match="no node had room"):
        await starting
    assert pools.waiting_for == ""
    assert pools.groups == (), "nobody is in that group"
    starting = asyncio.create_task(pools.start("decode", 1, WAIT_S))
    await until(lambda: len(groups) == 1)
    starting.cancel()


async def two_together(groups: list[Group], monkeypatch: pytest.MonkeyPatch) -> tuple[Pools, list[Member]]:
    """Two members that share a group, of which nothing has room any more once they are there."""

    def start_in(self: Pools, berth: Berth, pool: Pool, number: int) -> Member:
        return Member(worker_id=WorkerId(f"{pool}-{number}"), pool=pool, actor=f"{pool}-{number}", berth=berth)

    monkeypatch.setattr(Pools, "_start_in", start_in)
    monkeypatch.setattr(cluster.control.pools, "kill", lambda actor: None)
    pools = Pools(make_plan(load_config()), None)
    starting = asyncio.create_task(pools.start("decode", 2, 5.0, together=2))
    await until(lambda: len(groups) == 1)
    groups[0].room = True
    members = await starting
    groups[0].room = False
    return pools, members


async def test_a_group_stays_whose_last_member_ends_while_a_place_in_it_is_waited_for(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, (first, second) = await two_together(groups, monkeypatch)
    pools.end(first)
    starting = asyncio.create_task(pools.start("decode", 1))
    await until(lambda: pools.waiting_for != "")
    pools.end(second)
    assert len(groups) == 1
    groups[0].room = True
    (third,) = await asyncio.wait_for(starting, 5.0)
    assert (third.berth.group, len(groups)) == (first.berth.group, 1)
    pools.end(third)
    assert groups == []


async def test_a_place_that_becomes_free_while_another_is_waited_for_in_vain_is_used_again(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools, (first, second) = await two_together(groups, monkeypatch)
    pools.end(first)
    with pytest.raises(ChangeRefusedError, match="no node had room"):
        await pools.start("decode", 1, 0.05)
    groups[0].room = True
    (third,) = await pools.start("decode", 1, 5.0)
    assert (third.berth.group, len(groups)) == (first.berth.group, 1)
    pools.end(second)
    (fourth,) = await pools.start("decode", 1, 5.0)
    assert {third.berth.index, fourth.berth.index} == {0, 1}


async def test_a_group_that_somebody_has_removed_is_an_error_of_the_start(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = Pools(make_plan(load_config()), None)

    def wait(self: Group, timeout_s: float) -> bool:
        raise Exception("Placement group does not exist.")

    monkeypatch.setattr(Group, "wait", wait)
    with pytest.raises(StartupError, match="does not exist"):
        await pools.start("decode", 1, 5.0)
    assert groups == []


@pytest.mark.parametrize("given_up", [False, True])
async def test_of_members_that_do_not_all_start_none_stays(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch, given_up: bool
) -> None:
    killed: list[str] = []
    started = threading.Event()

    def start_in(self: Pools, berth: Berth, pool: Pool, number: int) -> Member:
        if number == 1:
            started.set()
            time.sleep(0.05)
            raise ValueError("the name is taken")
        return Member(worker_id=WorkerId(f"{pool}-{number}"), pool=pool, actor=f"{pool}-{number}", berth=berth)

    monkeypatch.setattr(Pools, "_start_in", start_in)
    monkeypatch.setattr(cluster.control.pools, "kill", killed.append)
    pools = Pools(make_plan(load_config()), None)
    starting = asyncio.create_task(pools.start("decode", 2, 5.0))
    await until(lambda: len(groups) == 2)
    for group in groups:
        group.room = True
    if given_up:
        assert await asyncio.to_thread(started.wait, 5.0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
    else:
        with pytest.raises(StartupError, match="the name is taken"):
            await starting
    await until(lambda: killed == ["decode-0"] and groups == [])
    assert pools.groups == ()


async def test_a_member_that_is_ended_twice_frees_its_place_once(
    groups: list[Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the group would be removed beneath the other, which is killed with it."""
    pools, (first, second) = await two_together(groups, monkeypatch)
    for _ in range(2):
        pools.end(first)
    assert pools.ended == {first.worker_id}
    assert len(groups) == 1
    pools.end(second)
    assert (groups, pools.groups) == ([], ())
