"""How level a placement is. Shapes: `L` layers, `E` experts, `X` shards, `S` slots."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from router.placement import Placement

Floats = npt.NDArray[np.float64]


def shard_loads(placement: Placement, loads_LE: npt.ArrayLike) -> Floats:
    """Load of every shard `[L, X]` when the replicas of an expert share its load equally."""
    return table_loads(placement.physical_to_logical, placement.num_shards, np.asarray(loads_LE, dtype=np.float64))


def table_loads(table_LS: npt.NDArray[Any], num_shards: int, loads_LE: Floats) -> Floats:
    """The same of a table `[L, S]` with negative numbers where no expert is."""
    layer_of, slot_of = (table_LS >= 0).nonzero()
    expert_of = table_LS[layer_of, slot_of]
    count_LE = np.zeros(loads_LE.shape, dtype=np.int64)
    np.add.at(count_LE, (layer_of, expert_of), 1)
    loads_LS = np.zeros(table_LS.shape)
    loads_LS[layer_of, slot_of] = loads_LE[layer_of, expert_of] / count_LE[layer_of, expert_of]
    loads_LX: Floats = loads_LS.reshape(len(table_LS), num_shards, -1).sum(2)
    return loads_LX


def balancedness(loads_LX: Floats, num_shards: int | None = None) -> Floats:
    """Mean over shards ÷ max over shards of each layer `[L]`; 1 is best, and that of a layer without load.

    Args:
        num_shards: how many the load can be spread over, if some of the `X` offer no slots.
    """
    peak_L = loads_LX.max(1)
    mean_L = loads_LX.sum(1) / (num_shards or loads_LX.shape[1])
    level_L: Floats = np.divide(mean_L, peak_L, out=np.ones_like(peak_L), where=peak_L > 0)
    return level_L
