"""`octet bench balance`: the balancer on the loads of a large model: how level, how many moves, how long.

Loads are those of 89 layers of 160 experts, 8 per token, skewed by a power law whose exponent differs from layer to
layer (`router.balancing.skew`).
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import Rebalance, plan
from router.balancing.skew import drifted, skewed_loads
from router.balancing.topology import Budget, Topology

_LAYERS, _EXPERTS, _TOP_K, _DRIFT, _REPEATS = 89, 160, 8, 0.2, 5
_CASES = ((16, 160), (16, 176), (16, 192), (32, 192), (64, 192))
_Result = TypeVar("_Result")


def bench_balance(seed: int = 0) -> None:
    """Per case, medians of five runs on one core: a first placement, then a fifth of the experts swap their loads with
    others, and at most a tenth of the slots may be filled anew."""
    table = Table(box=None, pad_edge=False)
    columns = ("shards", "slots", "balancedness", "ms", "after drift", "moved", "moved %", "then", "ms")
    for column in columns:
        table.add_column(column, justify="right")
    rng = np.random.default_rng(seed)
    for num_shards, num_slots in _CASES:
        loads_LE = skewed_loads(_LAYERS, _EXPERTS, _TOP_K, rng)
        topology = Topology(slots=(num_slots // num_shards,) * num_shards)
        first, first_s = _timed(functools.partial(plan, loads_LE, topology, Budget(), None))
        later_LE = drifted(loads_LE, _DRIFT, rng)
        tenth = Budget(max_moves=_LAYERS * num_slots // 10)
        again, again_s = _timed(functools.partial(plan, later_LE, topology, tenth, first.placement))
        table.add_row(
            str(num_shards),
            str(num_slots),
            _level(first, loads_LE),
            f"{first_s * 1e3:.0f}",
            _level(first, later_LE),
            str(len(again.moves)),
            f"{100 * len(again.moves) / (_LAYERS * num_slots):.1f}",
            _level(again, later_LE),
            f"{again_s * 1e3:.0f}",
        )
    Console(highlight=False).print(table)


def _level(rebalance: Rebalance, loads_LE: np.ndarray) -> str:
    return f"{float(np.mean(balancedness(shard_loads(rebalance.placement, loads_LE)))):.4f}"


def _timed(compute: Callable[[], _Result]) -> tuple[_Result, float]:
    compute()
    times_s = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        result = compute()
        times_s.append(time.perf_counter() - start_s)
    return result, statistics.median(times_s)
