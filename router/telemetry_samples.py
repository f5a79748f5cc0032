"""What the members of a cluster tell the router service about their work: readings of counters that only grow.

Shapes: `L` mixture-of-experts layers, `E` logical experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from octet.counters import FrameCounters, StepCounters
from octet.ids import WorkerId
from octet.messages import WorkerLoad


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardSample:
    """One expert shard."""

    worker_id: WorkerId
    incarnation: int
    """Another one after the process has been started again: its counters have then begun at 0."""
    uptime_s: float
    """How long it has served, by its own clock, when it read its counters."""
    tokens_LE: npt.NDArray[np.int64]
    """Token rows that it computed for each expert."""
    activated: int
    """Experts hit, summed over frames."""
    frames: FrameCounters
    lanes: Mapping[str, FrameCounters]
    """By the attention worker at the other end."""
    waiting: int
    """Frames that wait for their turn now."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """One attention worker."""

    worker_id: WorkerId
    incarnation: int
    uptime_s: float
    role: Literal["prefill", "decode"]
    steps: StepCounters
    load: WorkerLoad
    """What it holds now."""


Sample = ShardSample | WorkerSample
