"""What holds of every plan, whatever the loads, the shards and the placement before it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import ConfigError
from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import Rebalance, plan
from router.balancing.tables import fitted
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, Placement, from_physical, place_evenly

LAYERS = (3, 7)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Loads of two layers, and shards with room for the experts."""

    loads_LE: np.ndarray
    topology: Topology

    @property
    def num_experts(self) -> int:
        return int(self.loads_LE.shape[1])

    def first(self) -> Placement:
        return plan(self.loads_LE, self.topology, Budget(), None, LAYERS).placement


@st.composite
def cases(draw: st.DrawFn, min_domains: int = 1) -> Case:
    num_experts, num_shards = draw(st.integers(1, 14)), draw(st.integers(1, 6))
    slots = draw(st.lists(st.integers(0, 10), min_size=num_shards, max_size=num_shards))
    room = sum(min(size, num_experts) for size in slots)
    if room < num_experts:
        slots[draw(st.integers(0, num_shards - 1))] = num_experts
    nodes = draw(st.lists(st.integers(0, 2), min_size=num_shards, max_size=num_shards))
    return Case(
        loads_LE=draw(loads(num_experts)),
        topology=Topology(slots=tuple(slots), nodes=tuple(nodes), min_domains=min_domains),
    )


@st.composite
def loads(draw: st.DrawFn, num_experts: int) -> np.ndarray:
    """Skewed, with ties and zeros."""
    rows = st.lists(st.integers(0, 6), min_size=num_experts, max_size=num_experts)
    return np.array([[2.0**exponent - 1 for exponent in draw(rows)] for _ in LAYERS])


def assert_valid(placement: Placement, topology: Topology, num_experts: int) -> None:
    assert (placement.num_shards, placement.num_experts) == (topology.num_shards, num_experts)
    for shard, size in enumerate(topology.slots):
        for held in placement.held_by(shard).tolist():
            experts = [expert for expert in held if expert != EMPTY]
            assert len(experts) == len(set(experts)), "an expert twice on one shard"
            assert set(held[size:]) <= {EMPTY}, "a slot that the shard does not have"


def peaks(placement: Placement, loads_LE: np.ndarray) -> np.ndarray:
    largest_L: np.ndarray = shard_loads(placement, loads_LE).max(1)
    return largest_L


@given(cases())
def test_a_first_placement_fills_the_slots_and_puts_no_expert_twice_on_a_shard(case: Case) -> None:
    result = plan(case.loads_LE, case.topology, Budget(), None, LAYERS)
    assert_valid(result.placement, case.topology, case.num_experts)
    assert result.moves == ()
    assert (result.placement.layers, result.placement.version) == (LAYERS, 1)
    filled = (result.placement.physical_to_logical != EMPTY).sum(1)
    assert filled.tolist() == [sum(min(size, case.num_experts) for size in case.topology.slots)] * len(LAYERS)


@given(cases(min_domains=2))
def test_a_plan_for_survival_is_valid_as_well(case: Case) -> None:
    assert_valid(case.first(), case.topology, case.num_experts)


@given(cases(), st.data())
def test_moves_applied_to_what_fits_of_the_current_placement_give_the_new_one(case: Case, data: st.DataObject) -> None:
    before, after, topology = case.first(), data.draw(loads(case.num_experts)), data.draw(changed(case))
    result = plan(after, topology, Budget(max_moves=data.draw(st.integers(0, 9) | st.none())), before)
    assert_valid(result.placement, topology, case.num_experts)
    table_LS = np.maximum(fitted(before, topology, len(LAYERS)), EMPTY)
    freed = table_LS.copy()
    for move in result.moves:
        row = LAYERS.index(move.layer)
        assert table_LS[row, move.slot] == move.replaces != move.expert
        freed[row, move.slot] = move.expert
    # A slot whose expert moved into an empty one elsewhere is cleared without a move.
    cleared = (result.placement.physical_to_logical == EMPTY) & (freed != EMPTY)
    assert np.array_equal(np.where(cleared, EMPTY, freed), result.placement.physical_to_logical)


@st.composite
def changed(draw: st.DrawFn, case: Case) -> Topology:
    """The same shards, or some that drain, shrink or join."""
    slots = [draw(st.sampled_from([size, size, 0, size + 1])) for size in case.topology.slots]
    slots += draw(st.lists(st.integers(0, 8), max_size=2))
    if sum(min(size, case.num_experts) for size in slots) < case.num_experts:
        slots.append(case.num_experts)
    nodes = [*case.topology.nodes, 0, 1, 2]
    return Topology(slots=tuple(slots), nodes=tuple(nodes[: len(slots)]))


@given(cases(), st.data())
def test_no_layer_gets_worse_and_the_gains_add_up(case: Case, data: st.DataObject) -> None:
    before, after = case.first(), data.draw(loads(case.num_experts))
    budget = Budget(max_moves=data.draw(st.integers(0, 12)))
    result = plan(after, case.topology, budget, before)
    falls = peaks(before, after) - peaks(result.placement, after)
    assert (falls >= -1e-9).all()
    assert len(result.moves) <= (budget.max_moves or 0)
    for row, layer in enumerate(LAYERS):
        assert math.isclose(sum(move.gain for move in result.moves if move.layer == layer), falls[row], abs_tol=1e-6)
    assert [move.gain for move in result.moves] == sorted((move.gain for move in result.moves), reverse=True)


@given(cases(), st.data())
def test_a_move_that_does_not_pay_within_the_horizon_is_not_made(case: Case, data: st.DataObject) -> None:
    before, after = case.first(), data.draw(loads(case.num_experts))
    budget = Budget(move_cost=data.draw(st.floats(0.1, 40)), horizon=data.draw(st.floats(0.5, 8)))
    result = plan(after, case.topology, budget, before)
    fall = float((peaks(before, after) - peaks(result.placement, after)).sum())
    assert fall * budget.horizon >= len(result.moves) * budget.move_cost - 1e-6


@given(cases(), st.data())
def test_a_declined_plan_returns_the_current_placement_and_says_so(case: Case, data: st.DataObject) -> None:
    before = case.first()
    result = plan(data.draw(loads(case.num_experts)), case.topology, Budget(move_cost=1e9), before)
    assert result.placement is before
    assert result.moves == ()
    assert "no move pays" in result.reason


@given(cases())
def test_loads_that_the_placement_was_made_for_move_nothing(case: Case) -> None:
    before = case.first()
    result = plan(case.loads_LE, case.topology, Budget(move_cost=1e-6), before)
    assert result.placement is before


def moved(case: Case, topology: Topology, before: Placement) -> Rebalance:
    return plan(case.loads_LE, topology, Budget(max_moves=0), before)


@given(cases(), st.data())
def test_a_shard_that_drains_keeps_nothing_and_no_expert_is_lost(case: Case, data: st.DataObject) -> None:
    before, leaving = case.first(), data.draw(st.integers(0, case.topology.num_shards - 1))
    slots = [0 if shard == leaving else case.num_experts for shard in range(case.topology.num_shards)]
    topology = Topology(slots=(*slots, case.num_experts))
    result = moved(case, topology, before)
    assert (result.placement.held_by(leaving) == EMPTY).all()
    assert_valid(result.placement, topology, case.num_experts)
    assert all(math.isinf(move.gain) for move in result.moves), "only what would be lost moves"


def test_other_shards_are_another_placement_though_every_slot_holds_the_same() -> None:
    loads_LE = np.zeros((1, 4))
    before = plan(loads_LE, Topology(slots=(6, 0)), Budget(), None).placement
    after = plan(loads_LE, Topology(slots=(4, 0, 4)), Budget(max_moves=0), before).placement
    assert after.physical_to_logical.tolist() == before.physical_to_logical.tolist()
    assert (after.num_shards, after.version) == (3, before.version + 1)


@pytest.mark.parametrize("num_shards", [1, 3, 7, 12])
def test_shards_need_divide_nothing(num_shards: int) -> None:
    loads_LE = np.random.default_rng().random((2, 160))
    topology = Topology(slots=tuple(160 // num_shards + 1 + shard % 2 for shard in range(num_shards)))
    placement = plan(loads_LE, topology, Budget(), None).placement
    assert_valid(placement, topology, 160)
    assert balancedness(shard_loads(placement, loads_LE)).min() > 0.98


def test_survival_puts_every_expert_on_two_nodes_if_there_are_slots_for_it() -> None:
    loads_LE = np.random.default_rng().pareto(1.0, (20, 24))
    nodes = (0, 0, 1, 1, 2, 2)
    before = plan(loads_LE, Topology(slots=(8,) * 6, nodes=nodes), Budget(), None).placement
    topology = Topology(slots=(8,) * 6, nodes=nodes, min_domains=2)
    for current in (None, before):
        placement = plan(loads_LE, topology, Budget(), current).placement
        for row in placement.physical_to_logical.reshape(20, 3, 16):
            lost = [set(range(24)) - set(np.delete(row, node, axis=0).ravel().tolist()) for node in range(3)]
            assert lost == [set()] * 3


def test_groups_stay_on_one_node_each() -> None:
    loads_LE = np.random.default_rng().random((6, 24))
    topology = Topology(slots=(5,) * 6, nodes=(0, 0, 0, 1, 1, 1), num_groups=4)
    before = plan(loads_LE, topology, Budget(), None).placement
    after = plan(np.random.default_rng().random((6, 24)), topology, Budget(), before).placement
    for placement in (before, after):
        for row in placement.physical_to_logical.reshape(6, 2, 15):
            groups = [set((node[node != EMPTY] // 6).tolist()) for node in row]
            assert [len(group) for group in groups] == [2, 2]
            assert not groups[0] & groups[1]


def test_groups_that_fit_no_node_are_placed_globally() -> None:
    topology = Topology(slots=(5, 3), nodes=(0, 1), num_groups=2)
    assert_valid(plan(np.ones((1, 8)), topology, Budget(), None).placement, topology, 8)


def test_new_shards_take_load_from_the_old() -> None:
    loads_LE = np.random.default_rng().random((4, 32)) + 0.1
    before = place_evenly(range(4), 32, 1)
    result = plan(loads_LE, Topology(slots=(32, 12, 12)), Budget(), before)
    assert balancedness(shard_loads(result.placement, loads_LE)).min() > 0.95
    assert result.placement.version == before.version + 1
    assert f"{len(result.moves)} of" in result.reason


def test_the_reason_tells_how_level_the_placement_was_and_is() -> None:
    loads_LE = np.random.default_rng().pareto(1.0, (4, 32)) + 0.1
    before = place_evenly(range(4), 32, 4)
    result = plan(loads_LE, Topology(slots=(16,) * 4), Budget(), before)
    was, now = (balancedness(shard_loads(placement, loads_LE)).mean() for placement in (before, result.placement))
    assert f"balancedness {was:.4f} → {now:.4f}" in result.reason


def test_a_shard_takes_in_no_more_than_it_is_free_to_with_what_a_shard_that_drains_had() -> None:
    before, rng = place_evenly(range(20), 12, 3), np.random.default_rng()
    free_LX = np.full((20, 3), 4)
    after = plan(rng.pareto(1.0, (20, 12)), Topology(slots=(0, 8, 8)), Budget(), before, free_LX=free_LX).placement
    for shard in (1, 2):
        for old, new in zip(before.held_by(shard).tolist(), after.held_by(shard).tolist(), strict=True):
            assert len({*new} - {*old, EMPTY}) <= 4
    assert (free_LX == 4).all()


@pytest.mark.parametrize("max_moves", [1, 2, 3])
def test_a_budget_is_spent_to_the_last_move_while_moves_pay(max_moves: int) -> None:
    result = plan(np.ones((1, 8)), Topology(slots=(8, 8)), Budget(max_moves=max_moves), place_evenly((0,), 8, 1))
    assert len(result.moves) == max_moves


def test_experts_without_load_get_as_many_replicas_each() -> None:
    placement = plan(np.zeros((2, 6)), Topology(slots=(4,) * 3), Budget(), None).placement
    assert placement.num_replicas.tolist() == [[2] * 6] * 2


def test_the_least_loaded_replica_gives_way_to_an_expert_that_would_be_lost() -> None:
    before = from_physical(np.array([[0, 1, 0, 1, 2, EMPTY]], np.int32), (0,), 3, 3, version=1)
    loads_LE = np.array([[10.0, 2.0, 5.0]])
    placement = plan(loads_LE, Topology(slots=(2, 2, 0)), Budget(max_moves=0), before).placement
    assert placement.num_replicas.tolist() == [[2, 1, 1]]


def test_a_replica_gives_way_on_the_node_that_an_expert_has_to_be_on() -> None:
    held = [[0, 1, 2], [1, 2, 3], [0, 1, 2], [4, 5, 6], [5, 6, 7], [4, 5, 7]]
    before = from_physical(np.array(held, np.int32).reshape(1, -1), (0,), 8, 6, version=1)
    topology = Topology(slots=(3, 0, 3, 3, 3, 3), nodes=(0, 0, 0, 1, 1, 1), num_groups=2)
    placement = plan(np.repeat([[10.0, 1.0]], 4, axis=1), topology, Budget(max_moves=0), before).placement
    assert np.array_equal(placement.physical_to_logical[:, 9:], before.physical_to_logical[:, 9:])
    assert 3 in placement.physical_to_logical[:, :9]


@pytest.mark.parametrize(
    ("loads_LE", "slots", "text"),
    [
        (np.ones((1, 8)), (4, 3), "a slot for each of 8 experts"),
        (np.ones((1, 8)), (100, 0), None),
        (np.ones(8), (8,), r"\[layers, experts\]"),
        (-np.ones((1, 8)), (8,), "0 or more"),
        (np.full((1, 8), np.nan), (8,), "finite"),
    ],
)
def test_what_cannot_be_planned_is_refused(loads_LE: np.ndarray, slots: tuple[int, ...], text: str | None) -> None:
    if text is None:
        assert_valid(plan(loads_LE, Topology(slots=slots), Budget(), None).placement, Topology(slots=slots), 8)
        return
    with pytest.raises(ConfigError, match=text):
        plan(loads_LE, Topology(slots=slots), Budget(), None)


def test_a_placement_of_other_experts_or_of_more_shards_is_refused() -> None:
    with pytest.raises(ConfigError, match="as in the placement"):
        plan(np.ones((1, 8)), Topology(slots=(8,)), Budget(), place_evenly([1], 7, 1))
    with pytest.raises(ConfigError, match="offers 0 slots"):
        plan(np.ones((1, 8)), Topology(slots=(8,)), Budget(), place_evenly([1], 8, 2))


@pytest.mark.parametrize(
    "fields",
    [
        {"slots": ()},
        {"slots": (0, 0)},
        {"slots": (-1, 2)},
        {"slots": (1, 2), "nodes": (0,)},
        {"slots": (1,), "num_groups": 0},
        {"slots": (1,), "min_domains": 3},
        {"slots": (1,), "min_domains": 2, "num_groups": 2},
    ],
)
def test_a_contradictory_topology_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"topology\."):
        Topology(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"max_moves": -1}, {"move_cost": -1.0}, {"horizon": 0.0}])
def test_an_impossible_budget_is_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"budget\."):
        Budget(**fields)  # type: ignore[arg-type]
