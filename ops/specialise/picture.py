"""The report as a PNG. Needs matplotlib.

Shapes: `B` labels, `L` layers, `E` experts, `T` tokens.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ops.specialise.palette import blended, colours
from ops.specialise.report import Report, visible

_INK, _MUTED, _GRID = "#1f2933", "#6b7785", "#e4e8ec"
_STYLE: Any = {
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _MUTED,
    "axes.edgecolor": _GRID,
    "axes.axisbelow": True,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_MAX_LAYERS = 6
"""Drawn expert by expert; of more, those that tell most."""
_MAX_TOKENS = 120
"""Of the prompt."""
_BITS = (0.5, 2.0)
"""The scale of lifts ends at the largest of all, but not below √2 nor above 4, beyond which all look alike."""
_LEAST_BARS = 10
_WIDTH_IN = 13.0


def draw_report(file: pathlib.Path, report: Report) -> None:
    """Write it. Needs matplotlib, as `ops.bench.plot.require_matplotlib` checks."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    told_L = report.specialised.information_L
    layers = sorted(np.argsort(-told_L, kind="stable")[:_MAX_LAYERS].tolist())
    by_layer_in, prompt_in = 0.22 * len(report.labels) + 0.62, min(6.5, max(1.4, 0.17 * len(report.layers) + 0.9))
    matrix_in = max(2.2, min(6.0, 0.085 * report.num_experts + 0.6))
    most_bits = float(np.clip(np.log2(report.specialised.lift_BLE.max()), *_BITS))
    heights = [2.1, *[by_layer_in] * len(layers), prompt_in, matrix_in]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(
            figsize=(_WIDTH_IN, sum(heights) + 0.6), dpi=130, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
        )
        axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
        _information(axes[0], report)
        for axis, layer in zip(axes[1:-2], layers, strict=True):
            image = _lifts(axis, report, layer, most_bits)
        figure.colorbar(
            image, ax=axes[1:-2].tolist(), aspect=30, pad=0.01, shrink=0.8, label="chosen more often (log₂ of the lift)"
        )
        _prompt(axes[-2], report)
        _matrix(axes[-1], report, max(layers, key=lambda layer: told_L[layer]))
        tokens = report.specialised.tokens_B.sum()
        figure.suptitle(
            f"What the experts of {report.model} respond to: {len(report.layers)} layers of {report.num_experts} "
            f"experts, {report.experts_per_token} per token; {tokens:,} tokens in {sum(report.documents_B)} documents",
            fontsize=11.5, x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(file)


def _information(axis: Any, report: Report) -> None:
    specialised, at = report.specialised, np.arange(len(report.layers))
    _title(axis, "What the choice of one expert tells about the kind of text (0 nothing, 1 everything)")
    axis.bar(at, specialised.information_L, color="#2f6fb0", width=0.7, label="as labelled")
    axis.plot(
        at, specialised.chance_L, "_", color=_INK, markersize=9, markeredgewidth=1.6, label="labels shuffled: chance"
    )
    # A few layers shall not make a few fat bars.
    axis.set(xlim=(-0.6, max(len(at), _LEAST_BARS) - 0.4), ylim=(0, None), xlabel="layer")
    every = -(-len(at) // 30)
    axis.set_xticks(at[::every], [str(layer) for layer in report.layers[::every]])
    axis.grid(axis="y", color=_GRID)
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, frameon=False, ncols=2)


def _lifts(axis: Any, report: Report, layer: int, most_bits: float) -> Any:
    """Labels × experts, specialists of a label beside each other."""
    lift_BE = report.specialised.lift_BLE[:, layer]
    order_E = np.lexsort((-lift_BE.max(0), lift_BE.argmax(0)))
    bits_BE = np.log2(np.clip(lift_BE[:, order_E], 2**-most_bits, 2**most_bits))
    image = axis.imshow(bits_BE, aspect="auto", cmap="RdBu_r", vmin=-most_bits, vmax=most_bits)
    _title(axis, f"Layer {report.layers[layer]}: kinds of text × experts, specialists of a kind side by side")
    axis.set_yticks(range(len(report.labels)), report.labels)
    _colour_ticks(axis.get_yticklabels(), colours(len(report.labels)))
    if report.num_experts <= 64:
        axis.set_xticks(range(report.num_experts), [str(expert) for expert in order_E], fontsize=7)
    else:
        axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def _prompt(axis: Any, report: Report) -> None:
    """Tokens × layers, in the colour of the label whose specialists the token went to."""
    affinity_BLT = report.affinity_BLT[:, :, :_MAX_TOKENS]
    palette, (_, num_layers, num_tokens) = colours(len(report.labels)), affinity_BLT.shape
    image = np.zeros((num_layers, num_tokens, 3))
    for layer in range(num_layers):
        for token in range(num_tokens):
            affinity_B = affinity_BLT[:, layer, token]
            colour = blended(palette[int(affinity_B.argmax())], float(affinity_B.max()) / report.full_affinity)
            image[layer, token] = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    axis.imshow(image, aspect="auto", interpolation="nearest")
    _title(axis, "A prompt: whose specialists each token went to, by layer")
    _token_axes(axis, report, "layer")
    every = -(-num_layers // 20)
    axis.set_yticks(range(0, num_layers, every), [str(layer) for layer in report.layers[::every]])
    patches = [_patch(colour, label) for colour, label in zip(palette, report.labels, strict=True)]
    axis.legend(
        handles=patches, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, frameon=False, ncols=len(patches),
        handlelength=1, columnspacing=1.2,
    )  # fmt: skip


def _matrix(axis: Any, report: Report, layer: int) -> None:
    """Tokens × experts of one layer, by the weight that the gate gave them."""
    experts_TK = report.prompt.experts_LTK[layer, :_MAX_TOKENS]
    weights_TK = report.prompt.weights_LTK[layer, :_MAX_TOKENS]
    weights_ET = np.zeros((report.num_experts, len(experts_TK)))
    weights_ET[experts_TK, np.arange(len(experts_TK))[:, None]] = weights_TK / weights_TK.sum(1, keepdims=True)
    axis.imshow(weights_ET, aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    _title(axis, f"The same prompt: experts that each token chose in layer {report.layers[layer]}, by weight")
    _token_axes(axis, report, "expert")


def _token_axes(axis: Any, report: Report, rows: str) -> None:
    texts = [visible(report.texts[token_id]) for token_id in report.prompt.token_ids[:_MAX_TOKENS]]
    # A dollar sign would begin a formula.
    axis.set_xticks(range(len(texts)), [text.replace("$", r"\$") for text in texts], rotation=90, fontsize=7)
    axis.set_ylabel(rows)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _colour_ticks(ticks: Sequence[Any], palette: Sequence[str]) -> None:
    for tick, colour in zip(ticks, palette, strict=True):
        tick.set_color(colour)


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, loc="left", fontsize=10, fontweight="bold", color=_INK)
