"""Survival of a node, asked of placements that were made without regard to it."""

from __future__ import annotations

import numpy as np
import pytest

from router.balancing.planner import Rebalance, plan
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, Placement, from_physical, place_evenly


def spread(
    before: Placement, nodes: tuple[int, ...], loads_E: list[float], free_LX: np.ndarray | None = None
) -> Rebalance:
    """With no move that survival does not ask for."""
    topology = Topology(slots=(before.slots_per_shard,) * before.num_shards, nodes=nodes, min_domains=2)
    loads_LE = np.tile(np.array(loads_E), (len(before.layers), 1))
    return plan(loads_LE, topology, Budget(max_moves=0), before, free_LX=free_LX)


def placed(held: list[list[int]]) -> Placement:
    """One layer, by shard."""
    row = [expert for experts in held for expert in experts]
    return from_physical(np.array([row], np.int32), (0,), max(row) + 1, len(held), version=1)


def test_the_most_loaded_expert_gets_the_only_slot_that_may_be_filled() -> None:
    before = placed([[0, 1, 2, 3], [EMPTY] * 4])
    result = spread(before, (0, 1), [1.0, 3.0, 5.0, 2.0], free_LX=np.array([[0, 1]]))
    assert [(move.expert, move.slot // 4) for move in result.moves] == [(2, 1)]


def test_the_least_loaded_replica_that_can_be_missed_gives_way() -> None:
    before = placed([[0, 1, 2], [0, 1, 3], [0, 1, 2]])
    result = spread(before, (0, 1, 2), [9.0, 1.0, 5.0, 5.0])
    assert [(move.expert, move.replaces) for move in result.moves] == [(3, 1)]


@pytest.mark.parametrize("nodes", [(0, 0, 1), (0, 1, 1), (0, 1, 2)])
def test_experts_of_one_replica_stay_where_there_are_not_two_slots_for_each(nodes: tuple[int, ...]) -> None:
    before = place_evenly((0, 1), 5, 3)
    assert spread(before, nodes, np.random.default_rng().random(5).tolist()).placement is before


def test_a_second_replica_on_a_node_changes_places_with_an_expert_of_another() -> None:
    before = placed([[0, 1], [0, 2], [3, 4]])
    after = spread(before, (0, 0, 1), np.random.default_rng().random(5).tolist()).placement
    assert after.num_replicas.tolist() == before.num_replicas.tolist()
    assert 0 in after.held_by(2)
    assert 0 in np.concatenate([after.held_by(0), after.held_by(1)])


@pytest.mark.parametrize("num_experts", [6, 11])
def test_no_shard_takes_in_more_than_it_is_free_to_nor_an_expert_twice(num_experts: int) -> None:
    """Four shards on two nodes, with two slots for each expert and with fewer."""
    rng, num_layers, num_slots = np.random.default_rng(), 200, 16
    extra = rng.integers(num_experts, size=(num_layers, num_slots - num_experts))
    held_LS = np.concatenate([np.tile(np.arange(num_experts), (num_layers, 1)), extra], axis=1)
    held_LXC = rng.permuted(held_LS, axis=1).reshape(num_layers, 4, 4)
    # A shard holds an expert once.
    ranks = np.argsort(held_LXC, axis=2, kind="stable")
    held_LXC = np.take_along_axis(held_LXC, ranks, axis=2)
    held_LXC[:, :, 1:][held_LXC[:, :, 1:] == held_LXC[:, :, :-1]] = EMPTY
    held_LS = held_LXC.reshape(num_layers, -1).astype(np.int32)
    before = from_physical(held_LS, tuple(range(num_layers)), num_experts, 4, version=1)
    free_LX = rng.integers(0, 4, (num_layers, 4))
    after = spread(before, (0, 0, 1, 1), rng.random(num_experts).tolist(), free_LX).placement
    for shard in range(4):
        for old, new, free in zip(before.held_by(shard), after.held_by(shard), free_LX[:, shard], strict=True):
            held = new[new != EMPTY].tolist()
            assert len(held) == len(set(held))
            assert len({*held} - {*old.tolist()}) <= free
