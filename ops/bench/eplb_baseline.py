"""A baseline for the balancer: the greedy algorithm that DeepSeek's EPLB publishes, written from its description.

https://github.com/deepseek-ai/EPLB, global mode: the next replica always goes to the expert with the most load per
replica; then replicas, by falling load, go to the least loaded rank that has a slot left. Written for its balance: its
time says nothing about EPLB's.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def eplb_shard_loads(loads_E: Floats, num_slots: int, num_shards: int) -> Floats:
    """Load of each shard `[X]` of one layer, replicas sharing their expert's equally."""
    count_E = np.ones(len(loads_E))
    for _ in range(num_slots - len(loads_E)):
        count_E[(loads_E / count_E).argmax()] += 1
    shares = np.repeat(loads_E / count_E, count_E.astype(np.int64))
    loads_X, room_X = np.zeros(num_shards), np.full(num_shards, num_slots // num_shards)
    for share in np.sort(shares)[::-1]:
        shard = np.where(room_X > 0, loads_X, np.inf).argmin()
        loads_X[shard] += share
        room_X[shard] -= 1
    return loads_X
