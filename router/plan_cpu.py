"""The dispatch plan as one compiled pass over the tokens; see `router.plan`.

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `X` shards.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from model.vectors_cpu import declare
from router.gate import CompiledGate
from router.gate_cpu import select
from router.placement import EMPTY, Placement
from router.plan import StackedPlan
from router.replica_choice import choose_replicas

_compile: Any = numba.njit(nogil=True, cache=True)
_NO_CHOICE = np.empty((0, 0), np.int32)


class Replicas(NamedTuple):
    """Where the experts of one layer are."""

    slots_ER: npt.NDArray[np.int32]
    """Physical slots, in so many columns as the layer needs."""
    shards_ER: npt.NDArray[np.int32]
    count_E: npt.NDArray[np.int32]


def replicas_of(placement: Placement) -> dict[int, Replicas]:
    """By decoder layer."""
    found = {}
    for index, layer in enumerate(placement.layers):
        count_E = placement.num_replicas[index].copy()
        slots_ER = placement.logical_to_physical[index][:, : count_E.max()].copy()
        found[layer] = Replicas(slots_ER, slots_ER // np.int32(placement.slots_per_shard), count_E)
    return found


def route_rows(
    x_TH: npt.NDArray[np.float32],
    gate: CompiledGate,
    top_k: int,
    replicas: Replicas,
    num_shards: int,
    slots_per_shard: int,
    few_rows: int,
) -> StackedPlan:
    """`plan_rows` of what the gate selects."""
    plan = StackedPlan.make(num_shards, len(x_TH), top_k)
    _route_rows(x_TH, *gate, *replicas, slots_per_shard, few_rows, *plan)
    return plan


def plan_rows(
    expert_ids_TK: npt.NDArray[np.int64],
    weights_TK: npt.NDArray[np.float32],
    replicas: Replicas,
    num_shards: int,
    slots_per_shard: int,
    few_rows: int,
) -> StackedPlan:
    slots_TK = choose(expert_ids_TK, replicas, num_shards, few_rows)
    plan = StackedPlan.make(num_shards, *expert_ids_TK.shape)
    _plan_rows(expert_ids_TK, weights_TK, replicas.slots_ER, slots_TK, slots_per_shard, *plan)
    return plan


def choose(
    expert_ids_TK: npt.NDArray[np.int64], replicas: Replicas, num_shards: int, few_rows: int
) -> npt.NDArray[np.int32]:
    """The physical slot of every row `[T, K]`; an empty array where no expert has replicas to choose from."""
    if replicas.slots_ER.shape[1] == 1:
        return _NO_CHOICE
    slots_TK = np.empty(expert_ids_TK.shape, np.int32)
    choose_replicas(expert_ids_TK, *replicas, num_shards, few_rows, slots_TK)
    return slots_TK


def warm_up() -> None:
    """Compile, or load what was compiled before, so that no request waits for it."""
    two = np.zeros((1, 2), np.int32)
    replicas = Replicas(two, two, np.ones(1, np.int32))
    plan_rows(np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), replicas, 1, 1, 1)


@_compile  # type: ignore[untyped-decorator]
def _plan_rows(
    expert_ids: Any,
    weights: Any,
    physical: Any,
    chosen: Any,
    slots_per_shard: Any,
    counts: Any,
    rows: Any,
    slots: Any,
    shares: Any,
) -> None:
    num_tokens, top_k = expert_ids.shape
    no_choice = chosen.size == 0
    for token in range(num_tokens):
        for k in range(top_k):
            slot = physical[expert_ids[token, k], 0] if no_choice else chosen[token, k]
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


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], f4[:,:,::1], f4[::1], i8, i8, b1, f4, i4[:,::1], i4[:,::1], i4[::1], i8, i8, "
    "i8[::1], i8[:,::1], i4[:,:,::1], f4[:,:,::1])"
)
def _route_rows(
    x: Any,
    panels: Any,
    bias: Any,
    n_group: Any,
    topk_group: Any,
    normalise: Any,
    factor: Any,
    physical: Any,
    shard_of: Any,
    replicas: Any,
    slots_per_shard: Any,
    few_rows: Any,
    counts: Any,
    rows: Any,
    slots: Any,
    shares: Any,
) -> None:
    """`router.gate_cpu.select`, `choose_replicas` and `_plan_rows`."""
    shape = x.shape[0], slots.shape[2]
    scores = np.empty((x.shape[0], bias.shape[0]), np.float32)
    expert_ids, weights = np.empty(shape, np.int64), np.empty(shape, np.float32)
    select(x, panels, bias, n_group, topk_group, normalise, factor, scores, expert_ids, weights)
    chosen = np.empty(shape if physical.shape[1] > 1 else (0, 0), np.int32)
    if chosen.size > 0:
        choose_replicas(expert_ids, physical, shard_of, replicas, len(counts), few_rows, chosen)
    _plan_rows(expert_ids, weights, physical, chosen, slots_per_shard, counts, rows, slots, shares)
