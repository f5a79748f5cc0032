from __future__ import annotations

import numpy as np
import pytest
import torch

from octet.errors import ConfigError
from ops.bench.eplb_baseline import eplb_shard_loads
from router.balancing.eplb import rebalance_experts
from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import plan
from router.balancing.skew import drifted, skewed_loads
from router.balancing.topology import Budget, Topology

# The example of EPLB's README, and what it prints there.
WEIGHT = torch.tensor(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)
README_PHY2LOG = torch.tensor(
    [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
)


def level(weight: torch.Tensor, phy2log: torch.Tensor, num_parts: int) -> list[float]:
    """Mean ÷ max over GPUs or nodes of each layer."""
    levels = []
    for weight_E, experts_S in zip(weight.double(), phy2log, strict=True):
        shares_S = (weight_E / torch.bincount(experts_S, minlength=len(weight_E)))[experts_S]
        loads = shares_S.view(num_parts, -1).sum(1)
        levels.append((loads.mean() / loads.max()).item())
    return levels


@pytest.mark.parametrize("num_parts", [2, 8])
def test_the_example_of_the_readme_is_as_level_as_there(num_parts: int) -> None:
    phy2log, _, _ = rebalance_experts(WEIGHT, 16, 4, 2, 8)
    found, expected = level(WEIGHT, phy2log, num_parts), level(WEIGHT, README_PHY2LOG, num_parts)
    assert all(ours >= theirs - 1e-9 for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_groups", [4, 3])
def test_the_three_maps_agree(num_groups: int) -> None:
    phy2log, log2phy, logcnt = rebalance_experts(WEIGHT, 16, num_groups, 2, 8)
    assert (phy2log.shape, log2phy.shape[:2], logcnt.shape) == ((2, 16), (2, 12), (2, 12))
    assert {phy2log.dtype, log2phy.dtype, logcnt.dtype} == {torch.int64}
    for layer in range(2):
        for expert in range(12):
            slots = (phy2log[layer] == expert).nonzero().flatten().tolist()
            assert log2phy[layer, expert].tolist() == slots + [-1] * (log2phy.shape[2] - len(slots))
            assert logcnt[layer, expert] == len(slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_any_kind_are_taken(dtype: torch.dtype) -> None:
    weight = torch.randint(1, 200, (2, 12))
    expected = rebalance_experts(weight, 16, 4, 2, 8)
    for found, wanted in zip(rebalance_experts(weight.to(dtype).requires_grad_(), 16, 4, 2, 8), expected, strict=True):
        assert torch.equal(found, wanted)


def test_groups_stay_on_nodes_if_nodes_divide_them() -> None:
    phy2log, _, _ = rebalance_experts(WEIGHT, 16, 4, 2, 8)
    for first, second in (phy2log // 3).view(2, 2, 8).tolist():
        assert not set(first) & set(second)


@pytest.mark.parametrize("arguments", [(16, 4, 2, 7), (15, 4, 2, 8), (8, 4, 2, 8), (104, 4, 2, 8), (16, 4, 3, 8)])
def test_impossible_numbers_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ConfigError, match=r"num_gpus|num_replicas"):
        rebalance_experts(WEIGHT, *arguments)


@pytest.mark.parametrize(("num_shards", "num_slots"), [(16, 160), (16, 176), (32, 192), (64, 192)])
def test_first_placements_of_skewed_loads_are_at_least_as_level_as_eplbs(num_shards: int, num_slots: int) -> None:
    loads_LE = skewed_loads(20, 160, 8, np.random.default_rng())
    topology = Topology(slots=(num_slots // num_shards,) * num_shards)
    ours_L = balancedness(shard_loads(plan(loads_LE, topology, Budget(), None).placement, loads_LE))
    theirs_L = balancedness(np.array([eplb_shard_loads(loads_E, num_slots, num_shards) for loads_E in loads_LE]))
    assert ours_L.mean() >= theirs_L.mean() - 1e-6


@pytest.mark.parametrize("num_slots", [176, 192])
def test_a_tenth_of_the_slots_makes_up_for_a_fifth_of_drift(num_slots: int) -> None:
    rng = np.random.default_rng()
    loads_LE = skewed_loads(40, 160, 8, rng)
    topology = Topology(slots=(num_slots // 16,) * 16)
    before = plan(loads_LE, topology, Budget(), None).placement
    later_LE = drifted(loads_LE, 0.2, rng)
    result = plan(later_LE, topology, Budget(max_moves=40 * num_slots // 10), before)
    assert len(result.moves) <= 40 * num_slots // 10
    assert balancedness(shard_loads(before, later_LE)).mean() < 0.8
    assert balancedness(shard_loads(result.placement, later_LE)).mean() >= 0.97
