"""What the present placement leaves in the slots that a topology offers. Shapes: `L` layers, `S` slots, `X` shards."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from router.balancing.pack import BLOCKED, compiled
from router.balancing.topology import Topology
from router.placement import EMPTY, Placement

Table = npt.NDArray[np.int64]


def fitted(current: Placement | None, topology: Topology, num_layers: int) -> Table:
    """The table `[L, S]`: BLOCKED where a shard has no slot, and otherwise the expert that is there now, or EMPTY.

    A shard that is new is empty; one that offers fewer slots than before loses the last.
    """
    per_shard = topology.slots_per_shard
    offered_S = (np.arange(per_shard) < np.array(topology.slots)[:, None]).ravel()
    table_LS = np.tile(np.where(offered_S, np.int64(EMPTY), np.int64(BLOCKED)), (num_layers, 1))
    if current is not None:
        old_LXS = current.physical_to_logical.reshape(num_layers, current.num_shards, -1)
        new_LXS = table_LS.reshape(num_layers, topology.num_shards, -1)
        _copy(old_LXS, new_LXS)
    return table_LS


@compiled  # type: ignore[untyped-decorator]
def _copy(old: Any, new: Any) -> None:
    """Slot by slot, less what a shard would hold twice."""
    for layer in range(len(old)):
        for shard in range(old.shape[1]):
            for slot in range(min(old.shape[2], new.shape[2])):
                expert = old[layer, shard, slot]
                if new[layer, shard, slot] == EMPTY and (expert < 0 or (new[layer, shard, :slot] != expert).all()):
                    new[layer, shard, slot] = expert
