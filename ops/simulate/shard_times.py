"""How long shards take for a frame of so many tokens, under one placement and one set of loads.

Batches are sampled for some layers, their replicas chosen by the real `router.replica_choice`, and the costs applied to
what each shard gets. Between the batch sizes that were sampled, times are interpolated.

Shapes: `L` layers, `E` experts, `X` shards, `T` tokens, `K` experts per token, `N` batch sizes.
"""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import numpy.typing as npt

from ops.simulate.costs import Costs
from router.balancing.skew import Loads, sampled_experts
from router.placement import Placement
from router.plan_cpu import choose, replicas_of

_LAYERS_SAMPLED = 6
_SMALL_BATCH, _SMALL_REPEATS = 32, 4
Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardTimes:
    """By the number of tokens in the frame, from 0 on. Means over layers."""

    peak_s: Floats
    """Of the shard that takes longest."""
    mean_s: Floats
    """Of all shards, those that get no row included: what the pool's capacity is used up by."""
    rows_sent: Floats
    """Over all shards: each token once per shard that holds one of its experts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """Experts that sampled batches ask for, whatever the placement."""

    most_tokens: int
    ids: tuple[tuple[int, int, npt.NDArray[np.int64]], ...]
    """(tokens, row of the layer, experts `[T, K]`)."""


def sample_batches(loads_LE: Loads, top_k: int, most_tokens: int, seed: int) -> Batches:
    """Small batches several times, since they differ more."""
    rng = np.random.default_rng(seed)
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if size < most_tokens]
    layers = np.unique(np.linspace(0, len(loads_LE) - 1, _LAYERS_SAMPLED).round().astype(int)).tolist()
    return Batches(
        most_tokens=most_tokens,
        ids=tuple(
            (size, layer, sampled_experts(loads_LE[layer], size, top_k, rng))
            for size in (*sizes, most_tokens)
            for layer in layers
            for _ in range(_SMALL_REPEATS if size <= _SMALL_BATCH else 1)
        ),
    )


def shard_times(placement: Placement, batches: Batches, costs: Costs, few_rows: int) -> ShardTimes:
    """What batches cost under a placement."""
    replicas = list(replicas_of(placement).values())
    judged: dict[int, list[tuple[float, float, float]]] = collections.defaultdict(list)
    for size, layer, ids_TK in batches.ids:
        slots_TK = choose(ids_TK, replicas[layer], placement.num_shards, few_rows)
        if slots_TK.size == 0:
            slots_TK = replicas[layer].slots_ER[ids_TK, 0]
        judged[size].append(_judged(slots_TK, placement, costs))
    every, known = np.arange(batches.most_tokens + 1), np.array([0, *judged])
    means = np.array([np.mean(samples, axis=0) for samples in judged.values()])
    peak_s, mean_s, rows_sent = (np.interp(every, known, [0.0, *column]) for column in means.T)
    return ShardTimes(peak_s=peak_s, mean_s=mean_s, rows_sent=rows_sent)


def _judged(slots_TK: npt.NDArray[np.int32], placement: Placement, costs: Costs) -> tuple[float, float, float]:
    """(seconds of the slowest shard, mean over shards, rows sent)."""
    num_shards, per_shard = placement.num_shards, placement.slots_per_shard
    shards_TK = slots_TK // per_shard
    rows_X = np.bincount(shards_TK.ravel(), minlength=num_shards)
    reads_X = np.bincount(np.unique(slots_TK) // per_shard, minlength=num_shards)
    read_s, compute_s = reads_X * costs.expert_per_read_s, rows_X * costs.expert_per_row_s
    work_X = np.maximum(read_s, compute_s) if costs.reads_overlap else read_s + compute_s
    times_X = np.where(rows_X > 0, costs.expert_fixed_s + work_X, 0.0)
    ordered_TK = np.sort(shards_TK, axis=1)
    sent = len(ordered_TK) + int((ordered_TK[:, 1:] != ordered_TK[:, :-1]).sum())
    return float(times_X.max()), float(times_X.mean()), float(sent)
