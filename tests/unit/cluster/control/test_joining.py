"""Members that join, played: what becomes of it when somebody else is lost meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from cluster.control.membership import Membership
from cluster.control.services import FRONTEND
from octet.errors import UnavailableError
from octet.ids import Epoch, WorkerId
from router.placement import place_evenly
from router.routing import Routing
from router.transition import Transition
from tests.unit.cluster.played import PATIENT_S, PLAN, soon
from tests.unit.cluster.played_actors import Played, member, serving


async def test_a_join_is_given_up_as_soon_as_somebody_else_is_lost() -> None:
    prefill = Played("prefill-0", hangs_at=("send_to",))
    membership = await serving(member("experts", Played("experts-0")), member("prefill", prefill))
    newcomer = member("decode", Played("decode-0"))
    await membership.reach([newcomer])
    joining = asyncio.create_task(membership.enter([newcomer]))
    await asyncio.wait_for(prefill.asked_in_vain.wait(), PATIENT_S)
    membership.interrupt(WorkerId("experts-0"))
    with pytest.raises(UnavailableError, match="lost meanwhile"):
        await soon(joining)
    assert newcomer.worker_id not in membership
    assert "forget" in prefill.calls, "nothing joins the others to it"


async def test_nobody_joins_before_a_loss_is_dealt_with() -> None:
    prefill = member("prefill", Played("prefill-0"))
    membership = await serving(member("experts", Played("experts-0")), prefill)
    newcomer = member("decode", Played("decode-0"))
    await membership.reach([newcomer])
    membership.interrupt(WorkerId("prefill-0"))
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(membership.enter([newcomer]), PATIENT_S)
    await membership.leave([prefill])
    await asyncio.wait_for(membership.enter([newcomer]), PATIENT_S)
    assert newcomer.worker_id in membership


async def test_a_lane_and_a_kv_channel_are_formed_anew_between_members_that_live() -> None:
    shard, prefill, decode = Played("experts-0"), Played("prefill-0"), Played("decode-0")
    members = [member("experts", shard), member("prefill", prefill), member("decode", decode)]
    membership = await serving(*members)
    for actor in (shard, prefill, decode):
        actor.calls.clear()
    await asyncio.wait_for(membership.relink(members[2]), PATIENT_S)
    assert (decode.calls, shard.calls, prefill.calls) == (["link", "adopt"], ["link"], [])
    await asyncio.wait_for(membership.reopen(members[1], members[2]), PATIENT_S)
    assert (decode.calls, prefill.calls) == (["link", "adopt", "receive_from"], ["send_to"])


async def test_a_worker_that_does_not_adopt_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.control.membership.node_id", lambda: "another")
    astray: list[tuple[WorkerId, str]] = []
    decode = Played("decode-0", refuses=("adopt",))
    members = [*(member("experts", Played(shard)) for shard in PLAN.routing.shards), member("decode", decode)]
    membership = Membership(PLAN, {}, lambda *found: astray.append(found))
    await membership.reach(members)
    await membership.found(members)

    async def propose(epoch: Epoch) -> Transition:
        return Transition(target=membership.routing, fills=(), gain=0.0, reason="for a test")

    await asyncio.wait_for(membership.reroute(propose), PATIENT_S)
    assert [(worker_id, "did not adopt" in reason) for worker_id, reason in astray] == [("decode-0", True)]


async def test_whoever_joins_while_the_frontend_is_replaced_knows_the_new_one() -> None:
    prefill, newcomer = Played("prefill-0"), Played("decode-0", hangs_at=("start",))
    membership = await serving(member("experts", Played("experts-0")), member("prefill", prefill))
    await membership.reach([member("decode", newcomer)])
    joining = asyncio.create_task(membership.enter([member("decode", newcomer)]))
    await asyncio.wait_for(newcomer.asked_in_vain.wait(), PATIENT_S)
    await membership.meet_frontend(FRONTEND, "tcp://h:9")
    assert prefill.mailboxes[FRONTEND] == "tcp://h:9"
    assert FRONTEND not in newcomer.mailboxes
    newcomer.may_go_on.set()
    await asyncio.wait_for(joining, PATIENT_S)
    assert newcomer.mailboxes[FRONTEND] == "tcp://h:9"


async def test_nobody_waits_for_the_answer_of_a_worker_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one whose host is cut off no call ends by itself, and its loss is dealt with after the change under way."""
    monkeypatch.setattr("cluster.control.membership.node_id", lambda: "another")
    astray: list[WorkerId] = []
    prefill, decode = Played("prefill-0"), Played("decode-0", hangs_at=("adopt", "forget"))
    shards = [member("experts", Played(shard)) for shard in PLAN.routing.shards]
    membership = Membership(PLAN, {}, lambda worker_id, reason: astray.append(worker_id))
    workers = [member("prefill", prefill), member("decode", decode)]
    await membership.reach([*shards, *workers])
    await membership.found([*shards, *workers])

    async def propose(epoch: Epoch) -> Transition:
        return Transition(target=membership.routing, fills=(), gain=0.0, reason="for a test")

    routing = asyncio.create_task(membership.reroute(propose))
    await asyncio.wait_for(decode.asked_in_vain.wait(), PATIENT_S)
    membership.interrupt(WorkerId("decode-0"))
    await soon(routing)
    assert "adopt" in prefill.calls
    assert astray == [], "why it is lost is known already"
    # Neither is it waited for while another one leaves.
    await asyncio.wait_for(membership.leave([workers[0]]), PATIENT_S)


async def test_workers_are_told_to_give_up_a_shard_that_is_lost() -> None:
    """Their steps wait for one that is cut off, and nothing else lets them end."""
    prefill = Played("prefill-0")
    membership = await serving(member("experts", Played("experts-0")), member("prefill", prefill))
    membership.interrupt(WorkerId("experts-0"))
    await asyncio.wait_for(membership.give_up({WorkerId("experts-0")}), PATIENT_S)
    assert prefill.calls[-1] == "give_up"


async def test_a_shard_that_was_to_leave_is_named_to_the_controller_that_ends_the_change() -> None:
    """The one before had brought everybody to the routing without it, and did not live to end its process."""
    actors = {shard: Played(shard) for shard in PLAN.routing.shards}
    leaving, decode = PLAN.routing.shards[-1], Played("decode-0")
    members = [member("experts", actor) for actor in actors.values()]
    before = await serving(*members, member("decode", decode))
    endpoints = [before.endpoint(one.worker_id) for one in before.all()]
    following = Membership(PLAN, {})
    following.take_over(before.all(), [endpoint for endpoint in endpoints if endpoint], before.next_epoch)
    shards = tuple(shard for shard in PLAN.routing.shards if shard != leaving)
    placement = place_evenly(PLAN.routing.placement.layers, PLAN.model.n_routed_experts, len(shards), 9)
    following.adopting = Routing(epoch=Epoch(9), shards=shards, placement=placement), ()
    left = await asyncio.wait_for(following.settle(set()), PATIENT_S)
    assert [one.worker_id for one in left] == [leaving]
    assert leaving not in following
    assert decode.calls[-2:] == ["adopt", "forget"]


async def test_no_two_attempts_share_an_epoch_whichever_controller_makes_them() -> None:
    """What is late of an attempt that was given up must not be taken for the next one's."""
    shard, decode = Played("experts-0"), Played("decode-0")
    membership = await serving(member("experts", shard), member("decode", decode))
    noted: list[int] = []
    membership.note = lambda: noted.append(membership.next_epoch)
    for _ in range(3):
        await asyncio.wait_for(membership.relink(membership.member(WorkerId("decode-0"))), PATIENT_S)
    epochs = [args[1] for method, args in decode.asked if method == "link"]
    assert len(set(epochs)) == len(epochs) == 4
    assert epochs == [args[3] for method, args in shard.asked if method == "link"], "the same at both ends"
    assert [next_epoch > epoch for next_epoch, epoch in zip(noted, epochs[1:], strict=True)] == [True] * 3
