from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octet.errors import ConfigError
from octet.ids import Epoch, WorkerId
from router.balancing.measure import shard_loads
from router.balancing.topology import Budget
from router.placement import EMPTY, from_physical, place_evenly
from router.routing import Routing
from router.transition import Transition, compact, missing_experts, propose, shard_slots, with_capacity

LAYERS, NUM_EXPERTS = (1, 2, 4), 12
EPOCH = Epoch(9)


def routing(num_shards: int, capacity: int = NUM_EXPERTS) -> Routing:
    placement = with_capacity(place_evenly(LAYERS, NUM_EXPERTS, num_shards), capacity)
    return Routing(epoch=Epoch(3), shards=tuple(shard(n) for n in range(num_shards)), placement=placement)


def shard(number: int) -> WorkerId:
    return WorkerId(f"experts-{number}")


def random_loads() -> npt.NDArray[np.float64]:
    return np.random.default_rng().gamma(0.5, 100.0, (len(LAYERS), NUM_EXPERTS))


def reshaped(
    current: Routing,
    joining: Sequence[WorkerId] = (),
    leaving: Sequence[WorkerId] = (),
    lost: Sequence[WorkerId] = (),
) -> Transition:
    """Other shards, and no move that need not be."""
    return propose(
        current,
        random_loads(),
        epoch=EPOCH,
        num_redundant=0,
        budget=Budget(max_moves=0),
        joining=joining,
        leaving=leaving,
        lost=lost,
    )


def contents(routing: Routing) -> dict[tuple[WorkerId, int, int], int]:
    """(shard, layer, slot) → expert."""
    return {
        (shard, layer, slot): expert
        for shard in routing.shards
        for layer, row in routing.held_by(shard).items()
        for slot, expert in enumerate(row)
        if expert != EMPTY
    }


def assert_carried_out(current: Routing, step: Transition) -> None:
    """What is there and what is filled gives the target, and no slot that is in use is touched before it is adopted."""
    before, target = contents(current), contents(step.target)
    filled = {(fill.shard, fill.layer, fill.slot): fill.expert for fill in step.fills}
    assert not filled.keys() & before.keys()
    assert target == {place: expert for place, expert in (before | filled).items() if place in target}
    assert filled.keys() <= target.keys()
    for fill in step.fills:
        holders = {s for (s, layer, _), expert in before.items() if (layer, expert) == (fill.layer, fill.expert)}
        assert fill.source is None or fill.source in holders


def test_slots_are_shared_evenly_whatever_the_number_of_shards() -> None:
    assert shard_slots(160, 0, 7) == (23, 23, 23, 23, 23, 23, 22)
    assert shard_slots(160, 16, 12) == (15,) * 8 + (14,) * 4
    assert shard_slots(8, 2, 3, draining=[1]) == (5, 0, 5)


def test_a_shard_never_offers_more_slots_than_there_are_experts() -> None:
    assert shard_slots(8, 100, 2) == (8, 8)


def test_experts_without_a_shard_are_refused() -> None:
    with pytest.raises(ConfigError, match="a shard to hold the experts"):
        shard_slots(8, 0, 2, draining=[0, 1])


def test_the_compact_form_holds_the_same_in_no_more_slots_than_needed() -> None:
    wide = with_capacity(place_evenly(LAYERS, NUM_EXPERTS, 5), 9)
    narrow = compact(wide)
    assert narrow.slots_per_shard == 3
    for number in range(5):
        for row, packed in zip(wide.held_by(number), narrow.held_by(number), strict=True):
            assert sorted(row[row != EMPTY]) == sorted(packed[packed != EMPTY])


def test_nothing_is_moved_where_nothing_is_to_be_gained() -> None:
    current = routing(3)
    step = propose(
        current, np.ones((len(LAYERS), NUM_EXPERTS)), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=10)
    )
    assert step.fills == ()
    assert step.target.placement.version == current.placement.version
    assert step.target.epoch == current.epoch


def test_a_shard_that_joins_gets_its_share_from_those_that_have_it() -> None:
    current = routing(2)
    step = propose(
        current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=0), joining=[shard(7)]
    )
    assert_carried_out(current, step)
    assert step.target.shards == (shard(0), shard(1), shard(7))
    assert (step.target.epoch, step.target.placement.version) == (EPOCH, 2)
    assert [fill.shard for fill in step.fills] == [shard(7)] * len(LAYERS) * 4
    assert all(fill.source is not None for fill in step.fills)


def test_a_shard_that_leaves_lends_what_only_it_had() -> None:
    current = routing(3)
    step = propose(
        current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=0), leaving=[shard(1)]
    )
    assert_carried_out(current, step)
    assert step.target.shards == (shard(0), shard(2))
    assert {fill.source for fill in step.fills} == {shard(1)}
    assert len(step.fills) == len(LAYERS) * 4


def test_what_a_lost_shard_alone_had_comes_from_the_checkpoint() -> None:
    current = routing(3)
    step = propose(current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=0), lost=[shard(1)])
    assert_carried_out(current, step)
    assert {fill.source for fill in step.fills} == {None}
    assert sorted((fill.layer, fill.expert) for fill in step.fills) == missing_experts(current, [shard(1)])


def test_a_lost_shard_whose_experts_all_have_replicas_takes_no_fill() -> None:
    current = routing(2)
    doubled = propose(
        current, random_loads(), epoch=EPOCH, num_redundant=NUM_EXPERTS, budget=Budget(), min_domains=2
    ).target
    step = propose(
        doubled, random_loads(), epoch=EPOCH, num_redundant=NUM_EXPERTS, budget=Budget(max_moves=0), lost=[shard(0)]
    )
    assert missing_experts(doubled, [shard(0)]) == []
    assert step.fills == ()
    assert step.target.shards == (shard(1),)


def test_moving_without_free_slots_is_refused_with_the_field_to_change() -> None:
    current = routing(3, capacity=4)
    with pytest.raises(ConfigError, match=r"slots_per_shard.*0 free of 4 slots of experts-"):
        propose(current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=0), leaving=[shard(1)])


@pytest.mark.parametrize("num_shards", [2, 3, 4])
@pytest.mark.parametrize("num_redundant", [0, 3])
@pytest.mark.parametrize("spare", range(5))
def test_a_plan_for_the_same_shards_fits_the_slots_that_are_free_now(
    num_shards: int, num_redundant: int, spare: int
) -> None:
    base = shard_slots(NUM_EXPERTS, num_redundant, num_shards)[0]
    current = routing(num_shards, base + spare)
    for loads_LE in (random_loads() for _ in range(10)):
        step = propose(current, loads_LE, epoch=EPOCH, num_redundant=num_redundant, budget=Budget())
        assert_carried_out(current, step)
        held = collections.Counter(place[:2] for place in contents(current))
        for place, num_fills in collections.Counter((fill.shard, fill.layer) for fill in step.fills).items():
            assert num_fills <= base + spare - held[place]
        before, after = (shard_loads(r.placement, loads_LE).max(1).sum() for r in (current, step.target))
        assert after < before if spare >= 2 else after <= before


@pytest.mark.parametrize("min_domains", [1, 2])
def test_where_no_slot_is_free_nothing_moves_and_the_reason_says_so(min_domains: int) -> None:
    current = routing(3, capacity=4)
    step = propose(current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget(), min_domains=min_domains)
    assert (step.fills, step.target.placement.version) == ((), current.placement.version)
    assert "no slot is free to move an expert into: all 4 of every shard are filled" in step.reason


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_other_numbers_of_redundant_experts_never_ask_for_more_slots_than_are_free(data: st.DataObject) -> None:
    num_shards, spare = data.draw(st.integers(2, 4)), data.draw(st.integers(0, 4))
    min_domains = data.draw(st.integers(1, 2))
    current = routing(num_shards, shard_slots(NUM_EXPERTS, 6, num_shards)[0] + spare)
    for _ in range(4):
        step = propose(
            current,
            random_loads(),
            epoch=EPOCH,
            num_redundant=data.draw(st.integers(0, 6)),
            budget=Budget(),
            min_domains=min_domains,
        )
        assert_carried_out(current, step)
        current = step.target


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_chain_of_changes_keeps_every_expert_reachable(data: st.DataObject) -> None:
    current, fresh = routing(data.draw(st.integers(1, 4))), 10
    for _ in range(5):
        redundant = data.draw(st.integers(0, 6))
        joining = [shard(fresh + n) for n in range(data.draw(st.integers(0, 2)))]
        fresh += len(joining)
        spare = len(current.shards) + len(joining) - 1
        gone = data.draw(st.lists(st.sampled_from(current.shards), unique=True, max_size=min(spare, 2)))
        leaving, lost = gone[:1], gone[1:]
        step = propose(
            current,
            random_loads(),
            epoch=EPOCH,
            num_redundant=redundant,
            budget=Budget(max_moves=data.draw(st.integers(0, 20))),
            joining=joining,
            leaving=leaving,
            lost=lost,
        )
        assert_carried_out(current, step)
        for number in range(len(step.target.shards)):
            for row in step.target.placement.held_by(number):
                held = row[row != EMPTY].tolist()
                assert len(held) == len(set(held))
        current = step.target


def test_what_is_copied_is_spread_over_those_that_hold_it() -> None:
    current = routing(2)
    doubled = propose(
        current, random_loads(), epoch=EPOCH, num_redundant=NUM_EXPERTS, budget=Budget(), min_domains=2
    ).target
    step = reshaped(doubled, joining=[shard(7)])
    lent = collections.Counter(fill.source for fill in step.fills)
    assert lent.keys() == {shard(0), shard(1)}
    assert max(lent.values()) - min(lent.values()) <= 1


def test_layers_that_cannot_be_changed_count_for_nothing_and_the_reason_names_their_number() -> None:
    """Half of the experts would lose their last slot, and no slot is free for them."""
    held_S = [*range(9), *range(6), *range(9, 12)]
    placement = from_physical(np.array([held_S] * len(LAYERS), np.int32), LAYERS, NUM_EXPERTS, 2, version=5)
    current = Routing(epoch=Epoch(3), shards=(shard(0), shard(1)), placement=placement)
    step = propose(current, random_loads(), epoch=EPOCH, num_redundant=0, budget=Budget())
    assert (step.fills, step.target.placement.version) == ((), 5)
    assert f"; too few slots are free in {len(LAYERS)} layers, left as before" in step.reason
    assert (step.gain, step.needed) == (0, False)


def test_a_layer_that_cannot_be_changed_keeps_no_other_from_it() -> None:
    stuck_S = [*range(9), *range(6), *range(9, 12)]
    roomy_S = [*range(6), *[EMPTY] * 3, *range(6, 12), *[EMPTY] * 3]
    placement = from_physical(np.array([stuck_S, roomy_S], np.int32), (1, 4), NUM_EXPERTS, 2, version=5)
    current = Routing(epoch=Epoch(3), shards=(shard(0), shard(1)), placement=placement)
    loads_LE = np.random.default_rng().random((2, NUM_EXPERTS)) + np.repeat([100.0, 1.0], 6)
    step = propose(current, loads_LE, epoch=EPOCH, num_redundant=0, budget=Budget())
    assert_carried_out(current, step)
    assert {fill.layer for fill in step.fills} == {4}
    assert np.array_equal(step.target.placement.physical_to_logical[0], stuck_S)
    assert step.reason.endswith("; too few slots are free in 1 layer, left as before")
    before, after = (shard_loads(r.placement, loads_LE).max(1).sum() for r in (current, step.target))
    assert math.isclose(step.gain, before - after, rel_tol=0.05)


def test_where_slots_are_free_but_no_move_pays_the_reason_does_not_blame_the_slots() -> None:
    step = propose(
        routing(3), np.ones((len(LAYERS), NUM_EXPERTS)), epoch=EPOCH, num_redundant=0, budget=Budget(max_moves=10)
    )
    assert "no move pays" in step.reason


def test_a_slot_that_is_free_is_filled_though_another_shard_or_layer_has_none() -> None:
    full_S, roomy_S = [0, 1, 2, 3, 4, 5, EMPTY, EMPTY], [0, 1, 2, 3, 4, 5, 0, 1]
    placement = from_physical(np.array([full_S, roomy_S], np.int32), (1, 2), 6, 2, version=1)
    current = Routing(epoch=Epoch(3), shards=(shard(0), shard(1)), placement=placement)
    loads_LE = np.array([[9.0, 9.0, 9.0, 9.0, 1.0, 1.0]] * 2)
    step = propose(current, loads_LE, epoch=EPOCH, num_redundant=2, budget=Budget())
    assert_carried_out(current, step)
    assert {(fill.shard, fill.layer) for fill in step.fills} == {(shard(1), 1)}


def test_experts_without_load_are_shared_evenly_all_the_same() -> None:
    held_S = [*range(8), *[EMPTY] * 4, *range(8, 12), *[EMPTY] * 8]
    placement = from_physical(np.array([held_S] * len(LAYERS), np.int32), LAYERS, NUM_EXPERTS, 2, version=1)
    current = Routing(epoch=Epoch(3), shards=(shard(0), shard(1)), placement=placement)
    step = propose(current, np.zeros((len(LAYERS), NUM_EXPERTS)), epoch=EPOCH, num_redundant=4, budget=Budget())
    shares_LX = shard_loads(step.target.placement, np.ones((len(LAYERS), NUM_EXPERTS)))
    assert shares_LX.tolist() == [[6.0, 6.0]] * len(LAYERS)


def test_the_gain_of_what_has_to_move_is_no_number_to_add_up() -> None:
    step = reshaped(routing(3), lost=[shard(1)])
    assert step.needed
    assert math.isfinite(step.gain)


def test_domains_may_have_any_numbers() -> None:
    current = routing(4)
    domains = {shard(number): (-7, 10**9)[number // 2] for number in range(4)}
    step = propose(
        current,
        random_loads(),
        epoch=EPOCH,
        num_redundant=NUM_EXPERTS,
        budget=Budget(max_moves=0),
        domains=domains,
        min_domains=2,
    )
    for layer in LAYERS:
        for some in (current.shards[:2], current.shards[2:]):
            held = {expert for shard in some for expert in step.target.held_by(shard)[layer]}
            assert held >= set(range(NUM_EXPERTS))
