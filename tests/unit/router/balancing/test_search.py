"""What the local search may do, and what it leaves alone."""

from __future__ import annotations

import itertools

import numpy as np

from router.balancing.measure import balancedness, shard_loads, table_loads
from router.balancing.pack import ANYWHERE
from router.balancing.planner import plan
from router.balancing.search import search_layers
from router.balancing.tables import fitted
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, from_physical, place_evenly


def test_a_level_layer_is_left_alone_also_beside_shards_that_offer_no_slots() -> None:
    loads_LE = np.array([[26.0, 25.04, 25.0, 24.0, 25.02, 24.98, 25.0, 25.0]])
    assert plan(loads_LE, Topology(slots=(4, 4, 0)), Budget(), place_evenly((0,), 8, 2)).moves == ()


def test_experts_of_one_replica_are_levelled_over_nodes_though_survival_is_asked_for() -> None:
    loads_LE = np.array([[8.0] * 4 + [1.0] * 4])
    topology = Topology(slots=(4, 4), nodes=(0, 1), min_domains=2)
    placement = plan(loads_LE, topology, Budget(), place_evenly((0,), 8, 2)).placement
    assert balancedness(shard_loads(placement, loads_LE)).tolist() == [1.0]


def test_a_replica_on_a_third_node_gives_way_to_an_expert_in_demand() -> None:
    before = from_physical(np.array([[0, 1, 2, 0, 1, 3, 0, 2, 3]], np.int32), (0,), 4, 3, version=1)
    topology = Topology(slots=(3, 3, 3), nodes=(0, 1, 2), min_domains=2)
    placement = plan(np.array([[0.3, 30.0, 6.0, 6.0]]), topology, Budget(), before).placement
    assert placement.num_replicas.tolist() == [[2, 3, 2, 2]]


def test_no_shard_takes_in_more_than_it_is_free_to() -> None:
    rng, num_layers = np.random.default_rng(), 100
    before = place_evenly(range(num_layers), 18, 3)
    free_LX = rng.integers(0, 4, (num_layers, 3))
    for slots in (6, 7):
        topology = Topology(slots=(slots,) * 3)
        after = plan(rng.pareto(1.0, (num_layers, 18)), topology, Budget(), before, free_LX=free_LX).placement
        assert after is not before
        for shard in range(3):
            for old, new, free in zip(before.held_by(shard), after.held_by(shard), free_LX[:, shard], strict=True):
                assert len({*new.tolist()} - {*old.tolist(), EMPTY}) <= free


def test_what_a_shard_holds_twice_is_kept_once() -> None:
    current = from_physical(np.array([[0, 0, 1, 2]], np.int32), (0,), 3, 2, version=1)
    assert fitted(current, Topology(slots=(2, 2)), 1).tolist() == [[0, EMPTY, 1, 2]]


def test_a_replica_on_the_fullest_shard_gives_way_to_one_of_less_load() -> None:
    before = from_physical(np.array([[0, 1, 0, 2, 0, 3]], np.int32), (0,), 4, 3, version=1)
    loads_LE, free_LX = np.array([[3.0, 4.0, 1.0, 0.5]]), np.array([[1, 0, 0]])
    result = plan(loads_LE, Topology(slots=(2, 2, 2)), Budget(), before, free_LX=free_LX)
    assert [(move.slot, move.replaces) for move in result.moves] == [(0, 0)]
    assert shard_loads(result.placement, loads_LE).max() < shard_loads(before, loads_LE).max()


def test_the_largest_load_rises_with_no_edit() -> None:
    rng, num_layers, num_experts, num_shards = np.random.default_rng(), 200, 8, 5
    every_LXE = np.tile(np.arange(num_experts), (num_layers, num_shards, 1))
    tables_LS = rng.permuted(every_LXE, axis=2)[:, :, :4].reshape(num_layers, -1)
    # Experts that no shard holds take no part.
    loads_LE = rng.pareto(0.7, (num_layers, num_experts))
    loads_LE[(tables_LS[:, :, None] == np.arange(num_experts)).sum(1) == 0] = 0
    before_L = table_loads(tables_LS, num_shards, loads_LE).max(1)
    steps_L, moves_LN = np.zeros(num_layers, np.int64), np.zeros((num_layers, 64), np.int64)
    peaks_LN, edits_LN4 = np.zeros((num_layers, 64)), np.zeros((num_layers, 64, 4), np.int64)
    homes_LE, free_LX = np.full(loads_LE.shape, ANYWHERE), np.full((num_layers, num_shards), 99)
    nodes = np.arange(num_shards)
    search_layers(
        tables_LS, 4, nodes, homes_LE, False, loads_LE, free_LX, 999, 1e-3, steps_L, moves_LN, peaks_LN, edits_LN4
    )
    assert steps_L.any()
    for before, steps, peaks_N in zip(before_L, steps_L, peaks_LN, strict=True):
        way = [before, *peaks_N[:steps]]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(way))


def test_the_replica_gives_way_whose_expert_is_otherwise_on_a_shard_with_less_load() -> None:
    held = np.array([[0, 5, 1, 2, 1, 3, 2, 4]], np.int32)
    loads_LE = np.array([[12.0, 4.0, 4.0, 5.0, 3.0, 1.0]])
    before = from_physical(held, (0,), 6, 4, version=1)
    moves = plan(loads_LE, Topology(slots=(2,) * 4), Budget(max_moves=1), before).moves
    assert [(move.expert, move.slot, move.replaces) for move in moves] == [(0, 3, 2)]
