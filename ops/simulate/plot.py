"""A simulated run as a picture: what came, how large the pools were, and how the requests fared."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ops.bench.plot import AMBER, BLUE, INK, RED, STYLE, TEAL
from ops.simulate.outcome import Moment, Result, Run

_POOLS = {"prefill": AMBER, "decode": BLUE, "experts": TEAL}
_BINS = 80
_MINUTE = 6
"""Moments."""
_SHORTEST_MIN = 1e-6
"""Of an axis."""


def draw_run(file: pathlib.Path, run: Run, result: Result) -> None:
    """Write a PNG. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    minutes = np.array([moment.at_s for moment in run.moments]) / 60
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 9.2), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        axes = figure.subplots(4, 1, sharex=True, height_ratios=[0.7, 1.3, 0.9, 0.9])
        _arrivals(axes[0], run, minutes)
        _sizes(axes[1], run, minutes)
        _load(axes[2], run, minutes)
        _kept(axes[3], run)
        axes[3].set(xlabel="minutes", xlim=(0, max(float(minutes[-1]), _SHORTEST_MIN)))
        figure.suptitle(
            f"{result.requests:,} requests: {result.slo_attainment:.2%} kept their targets with "
            f"{result.gpu_hours:,.1f} GPU hours; {result.actions} changes of size, most reversals of a "
            f"pool in 10 min: {result.most_reversals}",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        figure.savefig(file)


def _arrivals(axis: Any, run: Run, minutes: Any) -> None:
    _title(axis, "Requests that arrive, per second (mean of a minute)")
    axis.plot(minutes, minute_means(run.moments), color=INK, linewidth=1.2)
    axis.set_ylim(0, None)


def minute_means(moments: Sequence[Moment]) -> npt.NDArray[np.float64]:
    """Arrivals per second around each moment, over as much of a minute as there is; 0 where no time passed."""
    # Each moment tells of the time since the one before.
    lasted_s = np.diff([0.0, *(moment.at_s for moment in moments)])
    arrived = lasted_s * [moment.arrivals_per_s for moment in moments]
    seconds, arrivals = _around(lasted_s), _around(arrived)
    return np.divide(arrivals, seconds, out=np.zeros(len(moments)), where=seconds > 0)


def _around(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The sum of the `_MINUTE` values around the end of each one."""
    return np.convolve(values, np.ones(_MINUTE))[_MINUTE // 2 :][: len(values)]


def _sizes(axis: Any, run: Run, minutes: Any) -> None:
    _title(axis, "GPUs by pool; dotted, those that serve already")
    for pool, color in _POOLS.items():
        axis.step(minutes, [m.sizes[pool] for m in run.moments], where="post", color=color, linewidth=1.8, label=pool)
        axis.step(
            minutes, [m.serving[pool] for m in run.moments], where="post", color=color, linewidth=1, linestyle=":"
        )
    axis.set_ylim(0, None)
    axis.legend(loc="upper left", frameon=False, ncols=3, fontsize=9)


def _load(axis: Any, run: Run, minutes: Any) -> None:
    _title(axis, "How full: KV pages of decode workers, shards' time, balancedness")
    axis.plot(minutes, [m.kv_occupancy for m in run.moments], color=_POOLS["decode"], linewidth=1.2, label="KV pages")
    axis.plot(minutes, [m.shard_busy for m in run.moments], color=_POOLS["experts"], linewidth=1.2, label="shards busy")
    axis.plot(
        minutes, [m.balancedness for m in run.moments], color=INK, linewidth=1, linestyle="--", label="balancedness"
    )
    axis.set_ylim(0, 1.03)
    axis.legend(loc="upper left", frameon=False, ncols=3, fontsize=9)


def _kept(axis: Any, run: Run) -> None:
    _title(axis, "Requests that missed a target, by their arrival, %")
    at_min = np.array([one.at_s for one in run.served]) / 60
    missed = np.array([not one.in_slo for one in run.served])
    edges = np.linspace(0, max(float(at_min.max()), _SHORTEST_MIN), _BINS + 1)
    all_of_them, _ = np.histogram(at_min, edges)
    bad, _ = np.histogram(at_min[missed], edges)
    share = np.divide(100 * bad, all_of_them, out=np.zeros(_BINS), where=all_of_them > 0)
    axis.stairs(share, edges, color=RED, fill=True, alpha=0.6)
    axis.axhline(1, color=INK, linewidth=1, linestyle=":")
    axis.set_ylim(0, max(5.0, float(share.max()) * 1.1))


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)
