"""What a trace of telemetry windows holds.

Shapes: `L` mixture-of-experts layers, `E` logical experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    model: str
    layers: tuple[int, ...]
    """The decoder layers that the rows of loads are of."""
    num_experts: int
    experts_per_token: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemberRecord:
    """One member within one window, as in `octet.v1.MemberLoad`. What its pool does not have is 0."""

    busy_share: float = 0.0
    rows_per_s: float = 0.0
    activated_experts: float = 0.0
    queue_depth: float = 0.0
    wait_s: float = 0.0
    step_s: float = 0.0
    wait_share: float = 0.0
    kv_share: float = 0.0


MEMBER_NUMBERS = tuple(field.name for field in dataclasses.fields(MemberRecord))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceWindow:
    """One stretch of the recording; the next begins where it ends."""

    t_s: float
    """When it began, after the recording did."""
    duration_s: float
    tokens: float
    """That went through the layers."""
    balancedness: float
    """Mean over layers of mean ÷ max over shards; 0 without traffic."""
    loads_LE: npt.NDArray[np.float64]
    """Token rows of each expert."""
    members: Mapping[str, MemberRecord]
    """By worker id; those that did not answer are not there."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    header: TraceHeader
    windows: tuple[TraceWindow, ...]
