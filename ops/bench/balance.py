"""`octet bench balance`: the balancer and the choice of replicas on the loads of a large model: how level, how fast.

Loads are those of 89 layers of 160 experts, 8 per token, skewed by a power law whose exponent differs from layer to
layer (`router.balancing.skew`).
"""

from __future__ import annotations

import functools
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from ops.bench.balance_plot import BatchLevels, Levels, draw_balance
from ops.bench.eplb_baseline import eplb_shard_loads
from ops.bench.plot import require_matplotlib
from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import Rebalance, plan
from router.balancing.skew import drifted, sampled_experts, skewed_loads
from router.balancing.topology import Budget, Topology
from router.plan_cpu import choose, replicas_of

_LAYERS, _EXPERTS, _TOP_K, _DRIFT, _REPEATS = 89, 160, 8, 0.2, 5
_CASES = ((16, 160), (16, 176), (16, 192), (32, 192), (64, 192))
_BATCHES, _ALWAYS = (1, 8, 32, 256, 4096), 2**31
_Result = TypeVar("_Result")


def bench_balance(plot: pathlib.Path | None = None, seed: int = 0) -> None:
    """Per case, medians of five runs on one core: a first placement, beside the greedy one that EPLB publishes; then a
    fifth of the experts swap their loads with others, and at most a tenth of the slots may be filled anew.

    Args:
        plot: a PNG to write. Raises: ConfigError where it could not be drawn.
    """
    if plot is not None:
        require_matplotlib(plot)
    table = Table(box=None, pad_edge=False)
    columns = ("shards", "slots", "level", "greedy's", "ms", "after drift", "moved", "moved %", "then", "ms")
    for column in columns:
        table.add_column(column, justify="right")
    rng, cases = np.random.default_rng(seed), []
    for num_shards, num_slots in _CASES:
        loads_LE = skewed_loads(_LAYERS, _EXPERTS, _TOP_K, rng)
        topology = Topology(slots=(num_slots // num_shards,) * num_shards)
        first, first_s = _timed(functools.partial(plan, loads_LE, topology, Budget(), None))
        later_LE = drifted(loads_LE, _DRIFT, rng)
        tenth = Budget(max_moves=_LAYERS * num_slots // 10)
        again, again_s = _timed(functools.partial(plan, later_LE, topology, tenth, first.placement))
        case = Levels(
            num_shards=num_shards,
            num_slots=num_slots,
            greedy=_greedy(loads_LE, num_slots, num_shards),
            first=_level(first, loads_LE),
            drifted=_level(first, later_LE),
            moved=_level(again, later_LE),
        )
        cases.append(case)
        table.add_row(
            str(num_shards),
            str(num_slots),
            f"{case.first:.4f}",
            f"{case.greedy:.4f}",
            f"{first_s * 1e3:.0f}",
            f"{case.drifted:.4f}",
            str(len(again.moves)),
            f"{100 * len(again.moves) / (_LAYERS * num_slots):.1f}",
            f"{case.moved:.4f}",
            f"{again_s * 1e3:.0f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print("\nReplicas chosen for each batch, 16 shards of 12 slots; reads are experts on the fullest shard\n")
    choices, batches = _choices(rng)
    console.print(choices)
    if plot is not None:
        draw_balance(plot, cases, batches)


def _choices(rng: np.random.Generator) -> tuple[Table, list[BatchLevels]]:
    """Means over layers, each with a batch of its own, and of the time the median; beside replicas taken in turn."""
    table = Table(box=None, pad_edge=False)
    for column in ("tokens", "regime", "level", "in turn", "reads", "in turn", "µs"):
        table.add_column(column, justify="right")
    loads_LE = skewed_loads(_LAYERS, _EXPERTS, _TOP_K, rng)
    levels: list[BatchLevels] = []
    layers = list(replicas_of(plan(loads_LE, Topology(slots=(12,) * 16), Budget(), None).placement).values())
    for num_tokens in _BATCHES:
        batches = [sampled_experts(loads_E, num_tokens, _TOP_K, rng) for loads_E in loads_LE]
        turn_T1 = np.arange(num_tokens)[:, None]
        level_in_turn, reads_in_turn = _judged(
            [
                replicas.slots_ER[ids_TK, turn_T1 % replicas.count_E[ids_TK]]
                for ids_TK, replicas in zip(batches, layers, strict=True)
            ]
        )
        for regime, few_rows in (("few rows", _ALWAYS), ("many rows", 0)):
            chosen = [
                _timed(functools.partial(choose, ids_TK, replicas, 16, few_rows))
                for ids_TK, replicas in zip(batches, layers, strict=True)
            ]
            level, reads = _judged([slots_TK for slots_TK, _ in chosen])
            table.add_row(
                str(num_tokens),
                regime,
                f"{level:.4f}",
                f"{level_in_turn:.4f}",
                f"{reads:.2f}",
                f"{reads_in_turn:.2f}",
                f"{statistics.median(time_s for _, time_s in chosen) * 1e6:.0f}",
            )
        # Of the last regime, the one for many rows.
        levels.append(BatchLevels(num_tokens=num_tokens, in_turn=level_in_turn, chosen=level))
    return table, levels


def _judged(choices: list[npt.NDArray[np.int32]]) -> tuple[float, float]:
    """(balancedness of rows, experts that the fullest shard reads), over 16 shards of 12 slots."""
    rows_LX = np.array([np.bincount(slots_TK.ravel() // 12, minlength=16) for slots_TK in choices])
    reads_LX = np.array([np.bincount(np.unique(slots_TK) // 12, minlength=16) for slots_TK in choices])
    return float(balancedness(rows_LX.astype(np.float64)).mean()), float(reads_LX.max(1).mean())


def _greedy(loads_LE: np.ndarray, num_slots: int, num_shards: int) -> float:
    """The balancedness of EPLB's published algorithm."""
    loads_LX = np.array([eplb_shard_loads(loads_E, num_slots, num_shards) for loads_E in loads_LE])
    return float(balancedness(loads_LX).mean())


def _level(rebalance: Rebalance, loads_LE: np.ndarray) -> float:
    return float(np.mean(balancedness(shard_loads(rebalance.placement, loads_LE))))


def _timed(compute: Callable[[], _Result]) -> tuple[_Result, float]:
    compute()
    times_s = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        result = compute()
        times_s.append(time.perf_counter() - start_s)
    return result, statistics.median(times_s)
