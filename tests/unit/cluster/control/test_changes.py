"""Changes of a cluster whose members and services are played: what becomes of them when somebody does not answer."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from cluster.control.changes import Changes
from cluster.control.membership import Membership
from cluster.control.pools import Member
from cluster.control.services import FRONTEND
from cluster.members import Endpoint, MemberStatus
from octet.errors import ChangeRefusedError, StartupError, UnavailableError
from octet.ids import WorkerId
from router.placement import EMPTY
from router.proposal import make_proposal
from router.routing import Routing
from tests.unit.cluster.played import PATIENT_S, PLAN, soon
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


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of this machine is killed for a played one."""
    monkeypatch.setattr("cluster.control.membership.node_id", lambda: "another")


async def test_a_pool_shrinks_also_where_one_that_leaves_is_lost_while_it_drains() -> None:
    cluster = await cluster_of(Played("decode-1", refuses=("status",)))
    await soon(cluster.changes.scale("decode", 1, "for a test"))
    assert "decode-1" not in cluster.membership
    assert cluster.pools.ended == ["decode-1"]
    assert cluster.changes.draining == frozenset()


async def test_who_has_left_is_ended_where_the_router_service_does_not_hear_of_it() -> None:
    router = Router("router", refuses=("watch",))
    cluster = await cluster_of(router=router)
    await soon(cluster.changes.scale("prefill", 1, "for a test"))
    assert cluster.pools.ended == ["prefill-1"]
    assert "stop" in cluster.actors["prefill-1"].calls
    assert "prefill-1" not in cluster.watched
    router.refuses = ()
    router.calls.clear()
    await soon(cluster.changes.tell_again())
    await soon(cluster.changes.tell_again())
    assert router.calls == ["watch"], "once it hears, it is told no more"


async def test_a_frontend_that_was_not_told_is_told_again_who_serves_by_then() -> None:
    frontend = Played("frontend-0", refuses=("set_workers",))
    cluster = await cluster_of(frontend=frontend)
    await soon(cluster.changes.scale("prefill", 1, "for a test"))
    frontend.refuses = ()
    frontend.calls.clear()
    await soon(cluster.changes.tell_again())
    assert frontend.calls == ["set_workers"]
    await soon(cluster.changes.tell_again())
    assert frontend.calls == ["set_workers"]


async def test_a_frontend_that_does_not_hear_that_it_is_to_serve_makes_way_for_another() -> None:
    cluster = await cluster_of(frontend=Played("frontend-0", refuses=("serve",)))
    with pytest.raises(UnavailableError):
        await soon(cluster.changes.replace_frontend("for a test"))
    assert cluster.services.given_up == 1
    assert cluster.membership.frontends[FRONTEND] == "tcp://h:9"


async def test_experts_that_move_arrive_also_where_nobody_waits_for_it_any_more() -> None:
    slow = Played("decode-0", hangs_at=("adopt",))
    cluster = await cluster_of(slow)
    before = cluster.membership.routing
    asking = asyncio.create_task(cluster.changes.rebalance(dry_run=False, reason="for a test"))
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
    asking = asyncio.create_task(cluster.changes.rebalance(dry_run=False, reason="for a test"))
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
    await soon(cluster.changes.set_redundancy(16, "for a test"))
    grown = cluster.membership.routing
    assert num_filled(grown) > num_filled(before)
    await soon(cluster.changes.set_redundancy(0, "for a test"))
    assert num_filled(cluster.membership.routing) == num_filled(before)
    assert cluster.membership.routing.placement.version > grown.placement.version
    assert cluster.changes.num_redundant == 0
    assert [change.kind for change in cluster.changes.log.records] == ["rebalance"] * 2


async def test_experts_stay_where_a_plan_gains_nothing_by_loads_that_it_was_not_made_for() -> None:
    router = Router("router")
    cluster = await cluster_of(router=router)
    before, router.level = cluster.membership.routing, True
    proposal = await soon(cluster.changes.rebalance(dry_run=False, min_gain=0.05, reason="for a test"))
    assert not proposal.pays(0.05)
    assert cluster.membership.routing == before
    router.level = False
    proposal = await soon(cluster.changes.rebalance(dry_run=False, min_gain=0.05, reason="for a test"))
    assert proposal.pays(0.05)
    assert cluster.membership.routing.placement.version > before.placement.version


@pytest.mark.parametrize(("nodes", "domains"), [("nn", None), ("nm", [1, 0])])
async def test_the_router_service_hears_which_shards_share_a_node(nodes: str, domains: list[int] | None) -> None:
    router = Router("router")
    shards = [OnNode(shard, node) for shard, node in zip(PLAN.routing.shards, nodes, strict=True)]
    cluster = await cluster_of(*shards, router=router)
    await soon(cluster.changes.rebalance(dry_run=True, reason="for a test"))
    ((_, args),) = (asked for asked in router.asked if asked[0] == "propose")
    assert args[6] == (None if domains is None else dict(zip(PLAN.routing.shards, domains, strict=True)))


class OnNode(Played):
    def __init__(self, worker_id: str, node: str) -> None:
        super().__init__(worker_id)
        self.node = node

    async def _answer(self, method: str, *args: Any) -> Any:
        answer = await super()._answer(method, *args)
        return dataclasses.replace(answer, node_id=self.node) if isinstance(answer, Endpoint) else answer


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
    await soon(cluster.changes.scale("prefill", 1, "for a test"))
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
        await soon(cluster.changes.scale("decode", 1, "for a test"))
    assert cluster.changes.draining == frozenset()
    assert "decode-1" in cluster.membership
    assert cluster.pools.ended == []


async def test_a_frontend_hears_that_who_leaves_is_given_nothing_more_and_then_that_it_is_gone() -> None:
    frontend = Played("frontend-0")
    cluster = await cluster_of(frontend=frontend)
    await soon(cluster.changes.scale("decode", 1, "for a test"))
    told = [(sorted(args[1]), args[2]) for method, args in frontend.asked if method == "set_workers"]
    assert told == [(["decode-0", "decode-1"], ["decode-1"]), (["decode-0"], [])]


async def test_redundancy_that_cannot_be_had_is_as_it_was() -> None:
    cluster = await cluster_of(router=Router("router"))
    before = cluster.changes.num_redundant
    cluster.changes.interrupt(WorkerId("prefill-0"))
    with pytest.raises(UnavailableError):
        await soon(cluster.changes.set_redundancy(16, "for a test"))
    assert cluster.changes.num_redundant == before
    assert cluster.changes.log.under_way == ""
    assert not cluster.changes.log.busy


async def until(so: Callable[[], bool]) -> None:
    """Within a few turns of the loop."""
    for _ in range(10_000):
        if so():
            return
        await asyncio.sleep(0)
    assert so()


async def at_rest(cluster: Cluster) -> None:
    """Until no change is gone through with."""
    await until(lambda: not cluster.changes._going_through)


async def on_standby(cluster: Cluster, *names: str) -> list[Played]:
    """Processes of the decode pool that are loaded."""
    actors = [Played(name) for name in names]
    members = [member("decode", actor) for actor in actors]
    await cluster.membership.reach(members)
    cluster.changes.standby.take_over(members)
    return actors


async def test_processes_for_which_there_is_no_place_any_more_are_ended() -> None:
    """Two ask for a third worker, while neither can be let in."""
    cluster = await cluster_of()
    actors = await on_standby(cluster, "decode-7", "decode-8")
    async with cluster.changes.log.change("rebalance", "for a test"):
        first = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
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
        await soon(cluster.changes.scale("decode", 3, "for a test"))
    assert cluster.pools.ended == ["decode-7"]
    assert cluster.membership.all() == before
    (record,) = cluster.changes.log.records
    assert (record.succeeded, "not now" in record.outcome) == (False, True)


async def test_a_change_is_under_way_until_it_ends_and_on_record_from_then_on() -> None:
    cluster = await cluster_of()
    log, noted = cluster.changes.log, list[str]()
    log.note = lambda: noted.append(log.under_way)
    async with log.change("scale", "for a test") as outcome:
        assert (log.under_way, log.busy, log.records) == ("scale", True, ())
        outcome.append("done")
    assert (log.under_way, log.busy) == ("", False)
    assert noted[0] == "scale"
    assert noted[-1] == ""
    with pytest.raises(UnavailableError):
        async with log.change("rebalance", "for a test"):
            raise UnavailableError("not now")
    assert (log.under_way, log.busy) == ("", False)
    assert [(one.kind, one.succeeded, one.outcome) for one in log.records] == [
        ("scale", True, "done"),
        ("rebalance", False, "not now"),
    ]


async def test_what_only_fails_on_record_is_there_only_where_it_has_failed() -> None:
    log = (await cluster_of()).changes.log
    async with log.attempt("scale", "for a test", only_failure=True):
        pass
    assert not log.records
    with pytest.raises(UnavailableError):
        async with log.attempt("scale", "for a test", only_failure=True):
            raise UnavailableError("no node has room")
    assert [one.outcome for one in log.records] == ["no node has room"]


async def test_a_pool_that_is_asked_for_another_size_waits_no_longer_for_processes_of_the_last() -> None:
    cluster, asked = await cluster_of(), asyncio.Event()

    async def start(*args: object) -> list[Member]:
        asked.set()
        await asyncio.Event().wait()
        return []

    cluster.pools.start = start  # type: ignore[attr-defined]
    growing = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
    await asyncio.wait_for(asked.wait(), PATIENT_S)
    await soon(cluster.changes.scale("decode", 1, "for a test"))
    with pytest.raises(ChangeRefusedError, match="another size"):
        await soon(growing)
    assert [one.worker_id for one in cluster.membership.pool("decode")] == ["decode-0"]
    assert cluster.changes.starting["decode"] == 0


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
    changes, growing = cluster.changes, asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
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
    assert changes.starting.get("decode", 0) == 0
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


async def test_a_worker_that_waits_for_the_first_shard_in_vain_is_ended() -> None:
    cluster = await cluster_of()
    await cluster.membership.leave(cluster.membership.pool("experts"))
    (actor,) = await on_standby(cluster, "decode-7")
    growing = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
    await until(lambda: "status" in actor.calls and not cluster.changes._preparation.starting["decode"])
    assert not growing.done()
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
        growing = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        if growing.done():
            break
        await soon(cluster.changes.scale("decode", last, "for a test"))
        await asyncio.gather(growing, return_exceptions=True)
        await at_rest(cluster)
        sizes.append(len(cluster.membership.pool("decode")))
    assert len(sizes) > 5
    assert sizes == [last] * len(sizes)


async def test_a_growth_that_waits_for_the_first_shard_is_given_up_for_another_size() -> None:
    cluster = await cluster_of()
    await cluster.membership.leave(cluster.membership.pool("experts"))
    (actor,) = await on_standby(cluster, "decode-7")
    growing = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
    await until(lambda: "status" in actor.calls and not cluster.changes._preparation.starting["decode"])
    await soon(cluster.changes.scale("decode", 2, "for a test"))
    with pytest.raises(ChangeRefusedError, match="another size"):
        await soon(growing)
    assert cluster.pools.ended == ["decode-7"]
    assert cluster.changes.starting["decode"] == 0


async def test_processes_that_are_ready_and_wait_for_their_turn_still_count_as_on_their_way() -> None:
    cluster = await cluster_of()
    (actor,) = await on_standby(cluster, "decode-7")
    async with cluster.changes.log.change("rebalance", "for a test"):
        growing = asyncio.create_task(cluster.changes.scale("decode", 3, "for a test"))
        await until(lambda: "status" in actor.calls)
        for _ in range(100):
            await asyncio.sleep(0)
            assert len(cluster.membership.pool("decode")) + cluster.changes.starting["decode"] == 3
    while not growing.done():
        assert len(cluster.membership.pool("decode")) + cluster.changes.starting["decode"] == 3
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
