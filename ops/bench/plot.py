"""A load as a picture: how the latencies are distributed, and what the cluster did over time."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError
from ops.bench.load import Outcome
from ops.bench.summary import Percentiles, Summary, counted

INK, MUTED, GRID = "#1f2933", "#6b7785", "#e4e8ec"
BLUE, TEAL, AMBER, RED = "#2f6fb0", "#2a9d8f", "#c77d0a", "#c0392b"
STYLE: Any = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_BINS = 60


def require_matplotlib(file: pathlib.Path) -> None:
    """Raises: ConfigError where `file` could not be drawn; better before a load than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            "--plot", "no matplotlib here", "the 'bench' extra", "install it with: pip install 'octet[bench]'"
        )
    if file.suffix.lower() != ".png":
        raise ConfigError("--plot", str(file), "a name that ends with .png")


def draw_load(
    file: pathlib.Path, outcomes: Sequence[Outcome], summary: Summary, slo_ttft_s: float, slo_tpot_s: float
) -> None:
    """Write a PNG: cumulative distributions of TTFT, TPOT and ITL; tokens per second and requests under way over time.

    Needs matplotlib, as `require_matplotlib` checks.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    good = [outcome for outcome in outcomes if not outcome.error]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 8.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        axes = figure.subplot_mosaic(
            [["ttft", "tpot", "itl"], ["tokens"] * 3, ["live"] * 3], height_ratios=[1.25, 1.0, 0.55]
        )
        ttft, tpot = [outcome.ttft_s for outcome in good], [o.tpot_s for o in good if o.tpot_s is not None]
        itl = [gap for outcome in good for gap in outcome.itl_s]
        _distribution(axes["ttft"], "Time to the first token (TTFT)", "requests", ttft, summary.ttft_s, slo_ttft_s)
        _distribution(axes["tpot"], "Time per output token (TPOT)", "requests", tpot, summary.tpot_s, slo_tpot_s)
        _distribution(axes["itl"], "Between tokens (ITL)", "gaps", itl, summary.itl_s, None)
        _throughput(axes["tokens"], outcomes, summary.duration_s)
        _under_way(axes["live"], outcomes, summary.duration_s)
        axes["live"].sharex(axes["tokens"])
        axes["tokens"].tick_params(labelbottom=False)
        errors = counted(summary.errors) or "none"
        figure.suptitle(
            f"{summary.requests} requests in {summary.duration_s:.1f} s: "
            f"{summary.tokens_per_s:.1f} tokens/s generated, {summary.prompt_tokens_per_s:.1f} prompt tokens/s, "
            f"goodput {summary.goodput_per_s:.2f} requests/s, errors: {errors}",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        figure.savefig(file)


def _distribution(
    axis: Any, title: str, of_what: str, values_s: Sequence[float], marks: Percentiles | None, slo_s: float | None
) -> None:
    """An empirical cumulative distribution in ms, with its percentiles named on the curve; none of no values."""
    _title(axis, title)
    axis.set(xlabel="ms", ylabel=f"% of {of_what} within", ylim=(0, 104))
    if marks is None:
        axis.text(0.5, 0.5, "nothing to show", ha="center", color=MUTED, transform=axis.transAxes)
        return
    x_ms = np.sort(np.asarray(values_s)) * 1000
    share = np.arange(1, len(x_ms) + 1) * 100 / len(x_ms)
    axis.step([0, *x_ms], [0, *share], where="post", color=BLUE, linewidth=2)
    axis.fill_between([0, *x_ms], [0, *share], step="post", color=BLUE, alpha=0.08, linewidth=0)
    right = float(x_ms[-1]) * 1.08
    lines = []
    for name, value_s, height in (("p50", marks.p50, 50), ("p95", marks.p95, 95), ("p99", marks.p99, 99)):
        axis.plot(value_s * 1000, height, "o", color=BLUE, markersize=5, clip_on=False)
        lines.append(f"{name} {value_s * 1000:>9,.1f}")
    axis.text(
        0.97, 0.06, "\n".join(lines), ha="right", va="bottom", family="monospace", transform=axis.transAxes,
        bbox={"facecolor": "white", "edgecolor": GRID, "boxstyle": "round,pad=0.5"},
    )  # fmt: skip
    if slo_s is not None and slo_s * 1000 <= right * 1.5:
        right = max(right, slo_s * 1080)
        axis.axvline(slo_s * 1000, color=AMBER, linestyle="--", linewidth=1.4)
        axis.annotate(
            f"SLO {slo_s * 1000:,.0f}", (slo_s * 1000, 65), xytext=(-4, 0), textcoords="offset points", rotation=90,
            ha="right", va="center", color=AMBER,
        )  # fmt: skip
    axis.set_xlim(0, right)


def _throughput(axis: Any, outcomes: Sequence[Outcome], duration_s: float) -> None:
    edges_s = np.linspace(0, duration_s, _BINS + 1)
    times_s = [outcome.due_s + time_s for outcome in outcomes for time_s in outcome.token_times_s]
    rates = np.histogram(times_s, edges_s)[0] / (duration_s / _BINS)
    axis.stairs(rates, edges_s, fill=True, color=TEAL, alpha=0.25)
    axis.stairs(rates, edges_s, color=TEAL, linewidth=1.6)
    mean = len(times_s) / duration_s
    axis.axhline(mean, color=INK, linewidth=1, linestyle=":")
    _title(axis, f"Tokens generated per second (dotted: the mean, {mean:,.1f})")
    axis.set(ylabel="tokens/s", xlim=(0, duration_s), ylim=(0, None))


def _under_way(axis: Any, outcomes: Sequence[Outcome], duration_s: float) -> None:
    """How many requests were waiting for their first token, and how many were receiving theirs; errors as crosses."""
    _title(axis, "Requests under way")
    times_s = np.linspace(0, duration_s, 4 * _BINS)
    waiting, streaming = np.zeros_like(times_s), np.zeros_like(times_s)
    for outcome in outcomes:
        end_s = outcome.due_s + outcome.end_s
        first_s = outcome.due_s + outcome.ttft_s if outcome.token_times_s else end_s
        waiting += _between(times_s, outcome.due_s, first_s)
        streaming += _between(times_s, first_s, end_s)
    axis.stackplot(
        times_s, streaming, waiting, labels=["receiving tokens", "before the first token"], colors=[TEAL, AMBER],
        alpha=0.45, linewidth=0,
    )  # fmt: skip
    failed_s = [outcome.due_s + outcome.end_s for outcome in outcomes if outcome.error]
    if failed_s:
        axis.plot(failed_s, np.zeros(len(failed_s)), "x", color=RED, clip_on=False, label="failed")
    axis.set(xlabel="seconds", ylabel="requests", ylim=(0, None))
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, frameon=False, ncols=3, fontsize=9)


def _between(times_s: npt.NDArray[np.float64], start_s: float, end_s: float) -> npt.NDArray[np.bool_]:
    return (times_s >= start_s) & (times_s < end_s)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10.5, fontweight="bold", color=INK)
