"""On which node each group of experts is. Four groups of six, unless a test says otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from octet.errors import ConfigError
from router.balancing.eplb import rebalance_experts
from router.balancing.planner import plan
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, Placement, from_physical, place_evenly

GROUP_SIZE, NUM_GROUPS = 6, 4


def loads(*per_group: float) -> np.ndarray:
    """Of one layer, the same for each expert of a group."""
    return np.repeat(np.array(per_group, dtype=np.float64) / GROUP_SIZE, GROUP_SIZE)[None]


def groups_on(placement: Placement, topology: Topology, group_size: int = GROUP_SIZE) -> list[list[set[int]]]:
    """The groups that each node has experts of, by layer."""
    found: list[list[set[int]]] = [[set() for _ in range(topology.num_nodes)] for _ in placement.layers]
    for shard, node in enumerate(topology.nodes):
        for row, held in zip(found, placement.held_by(shard), strict=True):
            row[node] |= set((held[held != EMPTY] // group_size).tolist())
    return found


def test_nodes_get_as_many_groups_though_one_has_room_for_more() -> None:
    topology = Topology(slots=(24, 24), nodes=(0, 1), num_groups=NUM_GROUPS)
    placement = plan(loads(8, 4, 2, 1), topology, Budget(), None).placement
    assert groups_on(placement, topology) == [[{0, 3}, {1, 2}]]


def test_a_node_with_room_for_more_groups_gets_them_where_the_others_lack_it() -> None:
    topology = Topology(slots=(9, 9, 6), nodes=(0, 0, 1), num_groups=NUM_GROUPS)
    placement = plan(np.random.default_rng().random((5, 24)), topology, Budget(), None).placement
    for first, second in groups_on(placement, topology):
        assert (len(first), len(second)) == (3, 1)
        assert not first & second


def test_a_node_with_more_shards_that_offer_slots_gets_the_more_loaded_groups() -> None:
    # The last shard drains, and does not count.
    topology = Topology(slots=(6, 6, 12, 0), nodes=(0, 0, 1, 1), num_groups=NUM_GROUPS)
    placement = plan(loads(8, 5, 4, 3), topology, Budget(), None).placement
    assert groups_on(placement, topology) == [[{0, 2}, {1, 3}]]


def test_groups_that_are_whole_on_a_node_stay_there_whatever_the_loads() -> None:
    rng = np.random.default_rng()
    topology = Topology(slots=(5,) * 6, nodes=(0, 0, 0, 1, 1, 1), num_groups=NUM_GROUPS)
    before = plan(rng.pareto(1.0, (10, 24)), topology, Budget(), None).placement
    after = plan(rng.pareto(1.0, (10, 24)), topology, Budget(), before).placement
    assert groups_on(after, topology) == groups_on(before, topology)


def test_groups_that_are_too_many_for_their_node_go_to_others() -> None:
    topology = Topology(slots=(24, 24), nodes=(0, 1), num_groups=NUM_GROUPS)
    result = plan(loads(8, 4, 2, 1), topology, Budget(max_moves=0), place_evenly((0,), 24, 1))
    assert groups_on(result.placement, topology) == [[{0, 3}, {1, 2}]]


def test_groups_that_are_on_several_nodes_are_put_on_one_by_their_loads() -> None:
    """Groups of two: the second and third are whole on the first node, the others on both."""
    before = from_physical(np.array([[0, 2, 3, 4, 5, 6, 1, 7, *[EMPTY] * 4]], np.int32), (0,), 8, 2, version=1)
    topology = Topology(slots=(6, 6), nodes=(0, 1), num_groups=NUM_GROUPS)
    loads_LE = np.array([[1.0, 1.0, 8.0, 8.0, 7.0, 7.0, 2.0, 2.0]])
    placement = plan(loads_LE, topology, Budget(max_moves=0), before).placement
    assert groups_on(placement, topology, group_size=2) == [[{0, 1}, {2, 3}]]


def test_groups_that_do_not_divide_the_experts_are_refused() -> None:
    topology = Topology(slots=(8, 8), nodes=(0, 1), num_groups=3)
    with pytest.raises(ConfigError, match="a divisor of the 8 experts"):
        plan(np.ones((1, 8)), topology, Budget(), None)


def test_groups_that_the_nodes_do_not_divide_are_no_groups_to_eplbs_interface() -> None:
    weight = torch.rand(4, 12)
    found, expected = (rebalance_experts(weight, 16, num_groups, 2, 8)[0] for num_groups in (3, 1))
    assert torch.equal(found, expected)


def test_a_slot_that_no_expert_of_its_group_can_take_stays_empty() -> None:
    """Both shards hold every expert of their group."""
    topology = Topology(slots=(6, 6), nodes=(0, 1), num_groups=2)
    placement = plan(np.random.default_rng().random((3, 8)), topology, Budget(), None).placement
    assert all(len(groups) == 1 for row in groups_on(placement, topology, group_size=4) for groups in row)
