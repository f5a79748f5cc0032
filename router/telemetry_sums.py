"""Differences and sums of what members counted, field by field.

Shapes: `L` mixture-of-experts layers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from itertools import chain
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
    counted: _T = _since(new, old)
    return counted


def total(parts: Sequence[_T]) -> _T:
    """The sum; a key that only some have counts as 0 in the others."""
    added: _T = _total(parts)
    return added


def _since(new: Any, old: Any) -> Any:
    if isinstance(new, Mapping):
        return {key: _since(value, old[key]) if key in old else value for key, value in new.items()}
    if dataclasses.is_dataclass(new):
        make: Any = type(new)
        return make(**{name: _since(getattr(new, name), getattr(old, name)) for name in _names(make)})
    if isinstance(new, np.ndarray):
        return np.where(new < old, new, new - old)
    return new if new < old else new - old


def _total(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _total([part[key] for part in parts if key in part]) for key in dict.fromkeys(chain(*parts))}
    if dataclasses.is_dataclass(first):
        make: Any = type(first)
        return make(**{name: _total([getattr(part, name) for part in parts]) for name in _names(make)})
    if isinstance(first, np.ndarray):
        return np.sum(parts, axis=0)
    return sum(parts)


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))
