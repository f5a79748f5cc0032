"""Pools of played members that grow and shrink, also where somebody does not answer or nobody waits any more."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from typing import Any

import pytest

from cluster.control.pools import Member
from cluster.members import MemberStatus
from octet.errors import ChangeRefusedError, StartupError, UnavailableError
from tests.unit.cluster.played import PATIENT_S, soon
from tests.unit.cluster.played_actors import Played, member
from tests.unit.cluster.played_cluster import Cluster, at_rest, cluster_of, on_standby, until


async def test_a_pool_shrinks_also_where_one_that_leaves_is_lost_while_it_drains() -> None:
    cluster = await cluster_of(Played("decode-1", refuses=("status",)))
    await soon(cluster.changes.sizes.scale("decode", 1, "for a test"))
    assert "decode-1" not in cluster.membership
    assert cluster.pools.ended == ["decode-1"]
    assert cluster.changes.announcements.draining == frozenset()


class Leased(Played):
    """Nothing runs there, but pages are lent to a decode worker until they are asked for so often."""

    def __init__(self, worker_id: str, num_looks: int) -> None:
        super().__init__(worker_id)
        self.num_looks = num_looks

    async def _answer(self, method: str, *args: Any) -> Any:
        answer = await super()._answer(method, *args)
        if not isinstance(answer, MemberStatus) or answer.load is None:
            return answer
        self.num_looks -= 1
        return dataclasses.replace(answer, load=dataclasses.replace(answer.load, leases=int(self.num_looks > 0)))


async def test_a_worker_leaves_when_its_pages_are_taken_and_not_before() -> None:
    leased = Leased("prefill-1", num_looks=3)
    cluster = await cluster_of(leased)
    await soon(cluster.changes.sizes.scale("prefill", 1, "for a test"))
    assert leased.num_looks == 0
    assert cluster.pools.ended == ["prefill-1"]


class Mistaken(Played):
    """A frontend whose process is there and does not take who serves."""

    async def _answer(self, method: str, *args: Any) -> Any:
        if method == "set_workers":
            raise StartupError("a mistake of ours")
        return await super()._answer(method, *args)


async def test_who_was_to_leave_is_no_more_on_its_way_out_where_the_change_fails() -> None:
    """A worker that stays and counts as draining would be given nothing any more."""
    cluster = await cluster_of(frontend=Mistaken("frontend-0"))
    with pytest.raises(StartupError):
        await soon(cluster.changes.sizes.scale("decode", 1, "for a test"))
    assert cluster.changes.announcements.draining == frozenset()
    assert "decode-1" in cluster.membership
    assert cluster.pools.ended == []


async def test_a_frontend_hears_that_who_leaves_is_given_nothing_more_and_then_that_it_is_gone() -> None:
    frontend = Played("frontend-0")
    cluster = await cluster_of(frontend=frontend)
    await soon(cluster.changes.sizes.scale("decode", 1, "for a test"))
    told = [(sorted(args[1]), args[2]) for method, args in frontend.asked if method == "set_workers"]
    assert told == [(["decode-0", "decode-1"], ["decode-1"]), (["decode-0"], [])]


async def test_processes_for_which_there_is_no_place_any_more_are_ended() -> None:
    """Two ask for a third worker, while neither can be let in."""
    cluster = await cluster_of()
    actors = await on_standby(cluster, "decode-7", "decode-8")
    async with cluster.changes.log.change("rebalance", "for a test"):
        first = asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
        await until(lambda: "status" in actors[0].calls)
        second = asyncio.create_task(cluster.changes.replenish("decode", 3, "for a test"))
        await until(lambda: "status" in actors[1].calls and not cluster.changes._preparation.starting["decode"])
    await soon(first)
    await soon(second)
    assert [one.worker_id for one in cluster.membership.pool("decode")] == ["decode-0", "decode-1", "decode-7"]
    assert cluster.pools.ended == ["decode-8"]


async def test_processes_that_cannot_join_are_ended_and_the_others_serve_on() -> None:
    cluster = await cluster_of()
    before = cluster.membership.all()
    (actor,) = await on_standby(cluster, "decode-7")
    actor.refuses = ("link",)
    with pytest.raises(UnavailableError):
        await soon(cluster.changes.sizes.scale("decode", 3, "for a test"))
    assert cluster.pools.ended == ["decode-7"]
    assert cluster.membership.all() == before
    (record,) = cluster.changes.log.records
    assert (record.succeeded, "not now" in record.outcome) == (False, True)


async def test_a_pool_that_is_asked_for_another_size_waits_no_longer_for_processes_of_the_last() -> None:
    cluster, asked = await cluster_of(), asyncio.Event()

    async def start(*args: object) -> list[Member]:
        asked.set()
        await asyncio.Event().wait()
        return []

    cluster.pools.start = start  # type: ignore[attr-defined]
    growing = asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
    await asyncio.wait_for(asked.wait(), PATIENT_S)
    await soon(cluster.changes.sizes.scale("decode", 1, "for a test"))
    with pytest.raises(ChangeRefusedError, match="another size"):
        await soon(growing)
    assert [one.worker_id for one in cluster.membership.pool("decode")] == ["decode-0"]
    assert cluster.changes.sizes.starting["decode"] == 0


# A played call that is cancelled before it begins is a coroutine that nobody awaits.
@pytest.mark.filterwarnings("ignore:coroutine 'Played._answer' was never awaited:RuntimeWarning")
@pytest.mark.parametrize("on_the_spot", [False, True], ids=["new", "standby"])
async def test_growing_that_nobody_waits_for_any_more_is_done_or_leaves_nothing_at_whatever_moment(
    on_the_spot: bool,
) -> None:
    """One turn of the loop later each time: also where the process is just ready, and nobody has taken it yet."""
    outcomes = []
    for num_turns in itertools.count():
        outcomes.append(await cancelled_growth(num_turns, on_the_spot))
        if outcomes[-1] == "was over":
            break
    assert set(outcomes) == {"undone", "done", "was over"}


async def cancelled_growth(num_turns: int, on_the_spot: bool) -> str:
    frontend = Played("frontend-0")
    cluster = await cluster_of(frontend=frontend)
    actor = (await on_standby(cluster, "decode-7"))[0] if on_the_spot else starting(cluster, "decode-7")
    changes, growing = cluster.changes, asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
    for _ in range(num_turns):
        await asyncio.sleep(0)
    if growing.done():
        return "was over"
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(growing)
    await at_rest(cluster)
    for _ in range(50):
        await asyncio.sleep(0)
    assert changes.sizes.starting.get("decode", 0) == 0
    assert (changes.log.under_way, changes.log.busy) == ("", False)
    told = [sorted(args[1]) for method, args in frontend.asked if method == "set_workers"]
    left = [one.worker_id for one in changes.standby.all()] + cluster.pools.ended
    if "decode-7" not in cluster.membership:
        assert told == []
        # One that has not been started by then needs no end.
        assert left == (["decode-7"] if on_the_spot or actor.calls else [])
        return "undone"
    assert (told, left) == ([["decode-0", "decode-1", "decode-7"]], [])
    assert "decode-7" in cluster.watched
    assert [one.succeeded for one in changes.log.records] == [True]
    return "done"


async def waiting_for_the_first_shard() -> tuple[Cluster, asyncio.Task[None]]:
    """A cluster without shards, and the growth by `decode-7` that is loaded and waits for one."""
    cluster = await cluster_of()
    await cluster.membership.leave(cluster.membership.pool("experts"))
    (actor,) = await on_standby(cluster, "decode-7")
    growing = asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
    await until(lambda: "status" in actor.calls and not cluster.changes._preparation.starting["decode"])
    assert not growing.done()
    return cluster, growing


async def test_a_worker_that_waits_for_the_first_shard_in_vain_is_ended() -> None:
    cluster, growing = await waiting_for_the_first_shard()
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(growing)
    assert cluster.pools.ended == ["decode-7"]
    assert "decode-7" not in cluster.membership


@pytest.mark.filterwarnings("ignore:coroutine 'Played._answer' was never awaited:RuntimeWarning")
@pytest.mark.parametrize("last", [1, 2])
async def test_the_size_asked_for_last_is_the_one_that_a_pool_has(last: int) -> None:
    """One turn of the loop later each time, until the first size is reached."""
    sizes = []
    for num_turns in itertools.count():
        cluster = await cluster_of()
        starting(cluster, "decode-7")
        growing = asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if growing.done():
            break
        await soon(cluster.changes.sizes.scale("decode", last, "for a test"))
        await asyncio.gather(growing, return_exceptions=True)
        await at_rest(cluster)
        sizes.append(len(cluster.membership.pool("decode")))
    assert len(sizes) > 5
    assert sizes == [last] * len(sizes)


async def test_a_growth_that_waits_for_the_first_shard_is_given_up_for_another_size() -> None:
    cluster, growing = await waiting_for_the_first_shard()
    await soon(cluster.changes.sizes.scale("decode", 2, "for a test"))
    with pytest.raises(ChangeRefusedError, match="another size"):
        await soon(growing)
    assert cluster.pools.ended == ["decode-7"]
    assert cluster.changes.sizes.starting["decode"] == 0


async def test_processes_that_are_ready_and_wait_for_their_turn_still_count_as_on_their_way() -> None:
    cluster = await cluster_of()
    (actor,) = await on_standby(cluster, "decode-7")
    async with cluster.changes.log.change("rebalance", "for a test"):
        growing = asyncio.create_task(cluster.changes.sizes.scale("decode", 3, "for a test"))
        await until(lambda: "status" in actor.calls)
        for _ in range(100):
            await asyncio.sleep(0)
            assert len(cluster.membership.pool("decode")) + cluster.changes.sizes.starting["decode"] == 3
    while not growing.done():
        assert len(cluster.membership.pool("decode")) + cluster.changes.sizes.starting["decode"] == 3
        await asyncio.sleep(0)
    await soon(growing)
    assert len(cluster.membership.pool("decode")) == 3


def starting(cluster: Cluster, name: str) -> Played:
    """The process of the decode pool that is started next."""
    actor = Played(name)

    async def start(*_: object) -> list[Member]:
        await asyncio.sleep(0)
        actor.calls.append("started")
        return [member("decode", actor)]

    cluster.pools.start = start  # type: ignore[attr-defined]
    return actor
