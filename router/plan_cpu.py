"""The dispatch plan as one compiled pass over the tokens; see `router.plan`.

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `X` shards.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from router.placement import EMPTY

_compile: Any = numba.njit(nogil=True, cache=True)
Plan = tuple[list[int], npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]


def plan_rows(
    expert_ids_TK: npt.NDArray[np.int64],
    weights_TK: npt.NDArray[np.float32],
    physical_ER: npt.NDArray[np.int32],
    replicas_E: npt.NDArray[np.int32],
    num_shards: int,
    slots_per_shard: int,
) -> Plan:
    """Rows per shard, then for each shard, in the first so many entries, row numbers, slots and weights."""
    num_tokens, top_k = expert_ids_TK.shape
    rows_XT = np.empty((num_shards, num_tokens), np.int64)
    slots_XTK = np.empty((num_shards, num_tokens, top_k), np.int32)
    weights_XTK = np.empty((num_shards, num_tokens, top_k), np.float32)
    counts = np.zeros(num_shards, np.int64)
    _plan_rows(
        expert_ids_TK, weights_TK, physical_ER, replicas_E, slots_per_shard, counts, rows_XT, slots_XTK, weights_XTK
    )
    return counts.tolist(), rows_XT, slots_XTK, weights_XTK


def warm_up() -> None:
    """Compile, or load what was compiled before, so that no request waits for it."""
    ids, slot = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int32)
    plan_rows(ids, np.ones((1, 1), np.float32), slot, np.ones(1, np.int32), 1, 1)


@_compile  # type: ignore[untyped-decorator]
def _plan_rows(
    expert_ids: Any,
    weights: Any,
    physical: Any,
    replicas: Any,
    slots_per_shard: Any,
    counts: Any,
    rows: Any,
    slots: Any,
    shares: Any,
) -> None:
    num_tokens, top_k = expert_ids.shape
    for token in range(num_tokens):
        for k in range(top_k):
            expert = expert_ids[token, k]
            slot = physical[expert, token % replicas[expert]]
            shard = slot // slots_per_shard
            count = counts[shard]
            if count == 0 or rows[shard, count - 1] != token:
                counts[shard] = count + 1
                rows[shard, count] = token
                for other in range(top_k):
                    slots[shard, count, other] = EMPTY
                    shares[shard, count, other] = 0
                count += 1
            slots[shard, count - 1, k] = slot - shard * slots_per_shard
            shares[shard, count - 1, k] = weights[token, k]
