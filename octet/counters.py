"""Counters that members of a cluster keep about their own work. They only ever grow while a process lives.

A member counts without locks and without asking anybody; the router service takes the difference of two readings
(`router.telemetry`).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrameCounters:
    """Frames that a shard has served, on one lane or on all."""

    frames: int = 0
    rows: int = 0
    busy_s: float = 0.0
    """Computing and replying."""
    wait_s: float = 0.0
    """Received, and waiting for their turn. Frames that wait at once add up, so the mean queue is this by the time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepCounters:
    """Steps that an attention worker has made."""

    steps: int = 0
    step_s: float = 0.0
    """Within steps that computed something."""
    combine_s: float = 0.0
    """Of that, waiting for the experts' sums."""
    tokens: int = 0
    """Prompt tokens computed, or tokens generated."""
