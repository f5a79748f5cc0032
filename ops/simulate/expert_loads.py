"""What experts are asked for over time: drawn from the skew generator with drift, or recorded from a cluster.

Shapes: `L` MoE layers, `E` experts.
"""

from __future__ import annotations

import bisect
import dataclasses
import pathlib

import numpy as np

from octet.errors import ConfigError
from router.balancing.skew import Loads, drifted, skewed_loads
from router.trace.files import read_trace


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLoads:
    """Constant from one start to the next."""

    starts_s: tuple[float, ...]
    """Ascending, the first 0."""
    windows: tuple[Loads, ...]
    """Shares `[L, E]` of the tokens that reach each expert; a layer sums to the experts per token."""

    def index_at(self, now_s: float) -> int:
        return max(0, bisect.bisect_right(self.starts_s, now_s) - 1)


def drawn(
    num_layers: int,
    num_experts: int,
    experts_per_token: int,
    rng: np.random.Generator,
    alpha: tuple[float, float] = (0.2, 1.0),
    drift: float = 0.0,
    drift_every_s: float = 600.0,
    duration_s: float = 0.0,
) -> ExpertLoads:
    """Every `drift_every_s`, `drift` of each layer's experts swap their loads with others."""
    windows = [skewed_loads(num_layers, num_experts, experts_per_token, rng, alpha)]
    starts_s = [0.0]
    while drift > 0 and starts_s[-1] + drift_every_s < duration_s:
        starts_s.append(starts_s[-1] + drift_every_s)
        windows.append(drifted(windows[-1], drift, rng))
    return ExpertLoads(starts_s=tuple(starts_s), windows=tuple(windows))


def recorded(file: pathlib.Path, num_layers: int, num_experts: int, experts_per_token: int) -> ExpertLoads:
    """The windows with traffic of what `octet experts record` has written.

    Raises: TraceError; ConfigError if it is of another model.
    """
    trace = read_trace(file)
    found = (len(trace.header.layers), trace.header.num_experts)
    if found != (num_layers, num_experts):
        expected = f"{num_layers} layers of {num_experts}, as in --model"
        raise ConfigError("--experts-trace", f"{found[0]} layers of {found[1]} experts", expected)
    windows = [window for window in trace.windows if window.loads_LE.sum() > 0]
    if not windows:
        raise ConfigError("--experts-trace", "no window with traffic", "one at least", "record under load")
    return ExpertLoads(
        starts_s=tuple(window.t_s - windows[0].t_s for window in windows),
        windows=tuple(_shares(window.loads_LE, experts_per_token) for window in windows),
    )


def _shares(window: Loads, experts_per_token: int) -> Loads:
    """A layer without traffic in this window is taken for a level one. No expert gets more than every token."""
    rows_L1 = window.sum(1, keepdims=True)
    level = experts_per_token / window.shape[1]
    shares: Loads = np.divide(window * experts_per_token, rows_L1, out=np.full_like(window, level), where=rows_L1 > 0)
    return np.minimum(shares, 1.0)
