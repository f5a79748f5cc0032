"""What the cluster did within the telemetry's window: a value, ready to be decided upon or shown.

Shares and rates of a member are by its own clock, from its first reading within the window to its last.

Shapes: `L` mixture-of-experts layers, `E` logical experts, `X` shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from octet.counters import FrameCounters, StepCounters
from octet.ids import WorkerId
from octet.messages import WorkerLoad


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneTelemetry:
    """One lane, as the shard sees it."""

    busy_share: float
    """Of the time, computing this lane's frames."""
    wait_s: float
    """How long a frame waited for its turn, on average."""
    frames_per_s: float
    rows_per_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardTelemetry:
    """One expert shard."""

    worker_id: WorkerId
    busy_share: float
    """Of the time, computing frames and replying."""
    busy_ewma: float
    wait_s: float
    """How long a frame waited for its turn, on average."""
    queue_depth: float
    """Frames that were waiting, on average over the time (Little's law: seconds waited per second)."""
    waiting: int
    """Frames that wait now."""
    frames_per_s: float
    rows_per_s: float
    activated_experts: float
    """Experts hit by a frame, on average."""
    tokens_L: npt.NDArray[np.int64]
    """Token rows by layer, each counted once per expert."""
    lanes: Mapping[str, LaneTelemetry]
    """By the attention worker at the other end."""
    since_start: FrameCounters


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerTelemetry:
    """One attention worker, and its lane as it sees it."""

    worker_id: WorkerId
    role: Literal["prefill", "decode"]
    busy_share: float
    """Of the time, within steps."""
    step_s: float
    """Mean duration of a step."""
    combine_share: float
    """Of the steps' time, waiting for the experts' sums."""
    combine_ewma: float
    steps_per_s: float
    tokens_per_s: float
    """Prompt tokens computed, or tokens generated."""
    kv_share: float
    """Of the KV pages, those in use; this and the next two are means over the readings."""
    running: float
    waiting: float
    load: WorkerLoad
    """What it holds now."""
    since_start: StepCounters


class HotExpert(NamedTuple):
    layer: int
    expert: int
    tokens: int
    ratio: float
    """To the mean of its layer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryWindow:
    end_s: float
    """On the router service's clock."""
    incarnation: int
    """Of the router service: another one has not heard what members that had left by then counted."""
    duration_s: float
    """What the window covers: less than it may while the service is young."""
    layers: tuple[int, ...]
    experts_per_token: int
    loads_LE: npt.NDArray[np.float64]
    """Token rows of each expert."""
    ewma_LE: npt.NDArray[np.float64]
    """Token rows per second of each expert, an exponentially weighted mean over all time."""
    total_LE: npt.NDArray[np.int64]
    """Token rows of each expert since the cluster started."""
    shards: tuple[ShardTelemetry, ...]
    """Those that have been heard of lately, in order of their ids; likewise `workers`."""
    workers: tuple[WorkerTelemetry, ...]

    @property
    def tokens(self) -> float:
        """Tokens that went through the layers."""
        return float(self.loads_LE.sum(1).max(initial=0)) / self.experts_per_token

    @property
    def balancedness_L(self) -> npt.NDArray[np.float64]:
        """Of each layer, mean over shards ÷ maximum over shards of the token rows that they computed; 0 without any.

        By what shards report, not by the placement: it was another one, perhaps, for a part of the window.
        """
        if not self.shards:
            return np.zeros(len(self.layers))
        tokens_XL = np.stack([shard.tokens_L for shard in self.shards])
        peak_L = tokens_XL.max(0)
        level_L: npt.NDArray[np.float64] = np.divide(
            tokens_XL.mean(0), peak_L, out=np.zeros(len(peak_L)), where=peak_L > 0
        )
        return level_L

    @property
    def balancedness(self) -> float:
        """Mean over the layers that had any traffic; 0 if none had."""
        level_L = self.balancedness_L
        return float(level_L[level_L > 0].mean()) if level_L.any() else 0.0

    def hottest(self, most: int) -> list[HotExpert]:
        """The experts with the largest load relative to their layer's mean, at most so many; those without are left
        out."""
        mean_L1 = self.loads_LE.mean(1, keepdims=True)
        ratio_LE = np.divide(self.loads_LE, mean_L1, out=np.zeros_like(self.loads_LE), where=mean_L1 > 0)
        order = np.argsort(-ratio_LE, axis=None, kind="stable")[:most]
        num_experts = ratio_LE.shape[1]
        return [
            HotExpert(
                layer=self.layers[at // num_experts],
                expert=at % num_experts,
                tokens=int(self.loads_LE.flat[at]),
                ratio=float(ratio_LE.flat[at]),
            )
            for at in order.tolist()
            if ratio_LE.flat[at] > 0
        ]
