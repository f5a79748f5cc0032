"""What the balancer promises for other numbers of redundant experts: why the autoscaler wants replicas, or not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cluster.autoscaling.signals import Prospect
from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import plan
from router.balancing.topology import Budget, Topology


def prospects(
    loads_LE: npt.NDArray[np.float64], num_shards: int, slots: int, slots_that_fit: int, max_redundant: int
) -> tuple[Prospect, ...]:
    """Balancedness after a rebalance with as many slots per shard and layer as now, one less, one or two more, and the
    least; by ascending redundancy. One plan each, some tens of milliseconds for a large model.

    Args:
        slots: per layer and shard, of the present placement.
        slots_that_fit: by a shard's memory.
        max_redundant: experts beyond one of each, over all shards; those that there are anyway are considered too.
    """
    num_experts = loads_LE.shape[1]
    least = -(-num_experts // num_shards)
    considered = {least, slots - 1, slots, slots + 1, slots + 2}
    return tuple(
        _prospect(loads_LE, num_shards, count)
        for count in sorted(considered)
        if least <= count <= max(slots_that_fit, slots)
        and (count <= slots or num_shards * count - num_experts <= max_redundant)
    )


def _prospect(loads_LE: npt.NDArray[np.float64], num_shards: int, slots: int) -> Prospect:
    placement = plan(loads_LE, Topology(slots=(slots,) * num_shards), Budget(), None).placement
    level_L = balancedness(shard_loads(placement, loads_LE))
    return Prospect(num_redundant_experts=num_shards * slots - loads_LE.shape[1], balancedness=float(np.mean(level_L)))
