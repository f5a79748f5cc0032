"""Differences and sums of what members counted, field by field.

Shapes: `L` mixture-of-experts layers.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from octet.counters import FrameCounters, StepCounters
from router.telemetry_samples import ShardSample, WorkerSample

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardSums:
    """What a shard did in some stretch of time."""

    elapsed_s: float
    tokens_L: npt.NDArray[np.int64]
    activated: int
    frames: FrameCounters
    lanes: Mapping[str, FrameCounters]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSums:
    """What an attention worker did in some stretch of time, and what it held at each of some moments, added up."""

    elapsed_s: float
    steps: StepCounters
    moments: int
    kv_share: float
    """Of the KV pages, those in use."""
    running: int
    waiting: int


def shard_sums(sample: ShardSample, last: ShardSample | None) -> tuple[ShardSums, npt.NDArray[np.int64]]:
    """What a shard did between two readings, or since it began to serve; and the token rows `[L, E]` of each expert."""
    tokens_LE = sample.tokens_LE if last is None else since(sample.tokens_LE, last.tokens_LE)
    sums = ShardSums(
        elapsed_s=sample.uptime_s - (last.uptime_s if last else 0.0),
        tokens_L=tokens_LE.sum(1),
        activated=since(sample.activated, last.activated if last else 0),
        frames=since(sample.frames, last.frames) if last else sample.frames,
        lanes=since(sample.lanes, last.lanes) if last else sample.lanes,
    )
    return sums, tokens_LE


def worker_sums(sample: WorkerSample, last: WorkerSample | None) -> WorkerSums:
    """What an attention worker did between two readings, or since it began to serve, and what it holds now."""
    load = sample.load
    return WorkerSums(
        elapsed_s=sample.uptime_s - (last.uptime_s if last else 0.0),
        steps=since(sample.steps, last.steps) if last else sample.steps,
        moments=1,
        kv_share=1 - load.kv_pages_free / load.kv_pages_total if load.kv_pages_total else 0.0,
        running=load.running,
        waiting=load.waiting,
    )


def since(new: _T, old: _T) -> _T:
    """What was counted between two readings of counters.

    A number that fell was counted from 0 again, and a new key begins at 0: a lane that is formed anew does both.
    """
    difference: _T = _by_field(new, old, _since)
    return difference


def added(first: _T, second: _T) -> _T:
    """The sum; a key that only one side has stays as it is."""
    total: _T = _by_field(first, second, operator.add, union=True)
    return total


def _since(new: Any, old: Any) -> Any:
    if isinstance(new, np.ndarray):
        return np.where(new < old, new, new - old)
    return new if new < old else new - old


def _by_field(first: Any, second: Any, operation: Callable[[Any, Any], Any], union: bool = False) -> Any:
    if isinstance(first, Mapping):
        merged = {k: _by_field(v, second[k], operation, union) if k in second else v for k, v in first.items()}
        return {**second, **merged} if union else merged
    if dataclasses.is_dataclass(first):
        names = [field.name for field in dataclasses.fields(first)]
        parts = {name: _by_field(getattr(first, name), getattr(second, name), operation, union) for name in names}
        make: Any = type(first)
        return make(**parts)
    return operation(first, second)
