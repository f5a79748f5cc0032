from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import ConfigError
from router.placement import EMPTY, Placement, from_physical, place_evenly


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Every expert once or more, and empty slots, in an order of their own in each of two layers."""
    num_experts, num_shards = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    redundant = draw(st.lists(st.integers(0, num_experts - 1), max_size=6))
    slots = [*range(num_experts), *redundant]
    slots += [EMPTY] * (-len(slots) % num_shards)
    rows = [draw(st.permutations(slots)) for _ in range(2)]
    return from_physical(np.array(rows, dtype=np.int32), (3, 4), num_experts, num_shards, version=7)


@given(placements())
def test_each_replica_is_found_in_the_slot_that_holds_it(placement: Placement) -> None:
    for physical, logical in zip(placement.physical_to_logical, placement.logical_to_physical, strict=True):
        replicas = [(expert, slot) for expert, slots in enumerate(logical.tolist()) for slot in slots if slot != EMPTY]
        held = [(expert, slot) for slot, expert in enumerate(physical.tolist()) if expert != EMPTY]
        assert sorted(replicas) == sorted(held)


@given(placements())
def test_replicas_are_counted_and_nothing_comes_behind_the_last(placement: Placement) -> None:
    exists = placement.logical_to_physical != EMPTY
    ranks = np.arange(exists.shape[2])
    assert (exists == (ranks < placement.num_replicas[:, :, None])).all()


@given(placements())
def test_the_shards_together_hold_all_slots(placement: Placement) -> None:
    held = [placement.held_by(shard) for shard in range(placement.num_shards)]
    assert np.array_equal(np.concatenate(held, axis=1), placement.physical_to_logical)


@given(st.integers(1, 40), st.data())
def test_an_even_placement_holds_each_expert_once_and_balances_counts(num_experts: int, data: st.DataObject) -> None:
    num_shards = data.draw(st.integers(1, num_experts))
    placement = place_evenly([1, 2], num_experts, num_shards)
    assert (placement.num_replicas == 1).all()
    counts = [int((placement.held_by(shard)[0] != EMPTY).sum()) for shard in range(num_shards)]
    assert max(counts) - min(counts) <= 1


def test_an_even_placement_gives_contiguous_runs() -> None:
    placement = place_evenly([1], 5, 2)
    assert placement.held_by(0).tolist() == [[0, 1, 2]]
    assert placement.held_by(1).tolist() == [[3, 4, EMPTY]]


def test_more_shards_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most the model's 4 experts"):
        place_evenly([1], 4, 5)


def test_an_expert_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="expert 1 of layer 9 has no slot"):
        from_physical(np.array([[0, 1], [0, 0]], dtype=np.int32), (8, 9), 2, 1, version=1)


@pytest.mark.parametrize("number", [-2, 2])
def test_an_expert_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.1"):
        from_physical(np.array([[0, 1, number]], dtype=np.int32), (1,), 2, 1, version=1)


def test_slots_that_do_not_divide_by_the_shards_are_refused() -> None:
    with pytest.raises(ValueError, match="3 slots do not fit"):
        from_physical(np.array([[0, 1, 1]], dtype=np.int32), (1,), 2, 2, version=1)


def test_rows_that_do_not_match_the_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1 rows .* do not fit 2 layers"):
        from_physical(np.array([[0, 1]], dtype=np.int32), (1, 2), 2, 1, version=1)


@pytest.mark.parametrize("field", ["physical_to_logical", "logical_to_physical", "num_replicas"])
def test_a_placement_cannot_be_changed(field: str) -> None:
    array = getattr(place_evenly([1], 4, 2), field)
    with pytest.raises(ValueError, match="read-only"):
        array.flat[0] = 0


def test_the_version_is_kept() -> None:
    assert place_evenly([1], 4, 2, version=5).version == 5


def test_a_model_without_such_layers_has_an_empty_placement() -> None:
    placement = place_evenly([], 4, 2)
    assert dataclasses.asdict(placement)["layers"] == ()
    assert placement.num_experts == 4


def test_shards_that_are_shunned_are_asked_only_for_what_nobody_else_holds() -> None:
    # Two shards of three slots: expert 0 on both, expert 1 on the first, 2 on the second.
    placement = from_physical(np.array([[0, 1, EMPTY, 0, 2, EMPTY]], np.int32), [1], 3, 2, version=1)
    spared = placement.without([0])
    assert spared.num_replicas.tolist() == [[1, 1, 1]]
    assert spared.logical_to_physical[0, :, 0].tolist() == [3, 1, 4]
    assert spared.physical_to_logical is placement.physical_to_logical
    assert placement.without([]) is placement
    assert placement.without([0, 1]).num_replicas.tolist() == [[2, 1, 1]]
