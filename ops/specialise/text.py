"""The report on a terminal, or in a text file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ops.specialise.palette import blended, colours
from ops.specialise.report import Report, visible

_LAYERS_IN_DETAIL, _EXPERTS_PER_LAYER = 3, 8
_TOKEN_WIDTH = 12
_DARK = "#101418"
_MARKED = 0.5
"""Of full strength: from here on a cell is named as well as coloured."""


def print_report(report: Report, console: Console) -> None:
    for part in _parts(report, console.width):
        console.print(part)


def _parts(report: Report, width: int) -> Iterator[Text | Table]:
    specialised = report.specialised
    yield Text(
        f"What the experts of {report.model} respond to: {len(report.layers)} layers of {report.num_experts} experts, "
        f"{report.experts_per_token} per token",
        style="bold",
    )
    corpus = ", ".join(
        f"{label} {tokens:,}" for label, tokens in zip(report.labels, specialised.tokens_B.tolist(), strict=True)
    )
    # As it is: what a label says is no markup.
    yield Text(f"{specialised.tokens_B.sum():,} tokens in {sum(report.documents_B)} documents: {corpus}\n")
    yield from _layers(report)
    detailed = np.argsort(-specialised.information_L, kind="stable")[:_LAYERS_IN_DETAIL]
    for layer in sorted(detailed.tolist()):
        yield _experts(report, layer)
        yield Text()
    yield from _prompt(report, width)


def _layers(report: Report) -> Iterator[Text | Table]:
    """How much an expert tells about the label, and the best specialist for each."""
    specialised, palette = report.specialised, colours(len(report.labels))
    yield Text("What one choice tells about the kind of text (0 nothing, 1 all), and the best", style="bold")
    yield Text("specialist of each kind: the expert, and how much more often it is chosen", style="bold")
    table = _table("layer", "tells", "chance")
    for column in table.columns:
        column.min_width = len(str(column.header))
    for label, colour in zip(report.labels, palette, strict=True):
        table.add_column(Text(label, style=colour), justify="right", no_wrap=True, min_width=7)
    for index, layer in enumerate(report.layers):
        best = {specialist.label: specialist for specialist in reversed(report.specialists(index))}
        cells = [f"{best[b].expert} {best[b].lift:.1f}×" if b in best else "-" for b in range(len(report.labels))]
        information, chance = specialised.information_L[index], specialised.chance_L[index]
        table.add_row(str(layer), f"{information:.3f}", f"{chance:.3f}", *cells)
    yield table
    yield Text()


def _experts(report: Report, layer: int) -> Table:
    table = _table("expert", "tokens", "responds to", "most for")
    table.title = f"layer {report.layers[layer]}, its most specialised experts"
    table.title_justify, table.title_style = "left", "bold"
    table.columns[2].justify = table.columns[3].justify = "left"
    table.columns[3].overflow, table.columns[3].no_wrap = "ellipsis", True
    palette = colours(len(report.labels))
    for found in report.specialists(layer)[:_EXPERTS_PER_LAYER]:
        seen = "  ".join(visible(report.texts[trigger.token_id]) for trigger in report.triggers[layer][found.expert])
        label = Text(f"{report.labels[found.label]} {found.lift:.1f}×", style=palette[found.label])
        table.add_row(str(found.expert), f"{found.share:.0%}", label, Text(seen))
    return table


def _prompt(report: Report, width: int) -> Iterator[Text | Table]:
    """A cell per token and layer, in the colour of the label whose specialists the token went to."""
    palette, num_layers, full = colours(len(report.labels)), len(report.layers), report.full_affinity
    yield Text("Whose specialists each token of a prompt went to, from the first layer on", style="bold")
    keys = [label[0] if _initials_differ(report) else str(b) for b, label in enumerate(report.labels)]
    yield Text("  ").join(
        Text(f"{key} {label}", style=colour) for key, label, colour in zip(keys, report.labels, palette, strict=True)
    )
    room = max(8, width - _TOKEN_WIDTH - 1)
    cell = max(1, min(3, room // num_layers))
    shown = range(0, num_layers, -(-num_layers * cell // room))
    lines = []
    for position, token_id in enumerate(report.prompt.token_ids):
        line = Text(f"{visible(report.texts[token_id])[:_TOKEN_WIDTH]:>{_TOKEN_WIDTH}} ")
        for layer in shown:
            affinity_B = report.affinity_BLT[:, layer, position]
            label, strength = int(affinity_B.argmax()), float(affinity_B.max()) / full
            # What is hardly specialised is left blank: not every reader sees the colours.
            mark = keys[label] if strength >= _MARKED else " "
            line.append(f"{mark:^{cell}}", Style(color="#ffffff", bgcolor=blended(palette[label], strength, _DARK)))
        lines.append(line)
    columns = max(1, (width + 2) // (_TOKEN_WIDTH + 1 + cell * len(shown) + 2))
    rows = -(-len(lines) // columns)
    table = Table.grid(padding=(0, 2))
    for row in range(rows):
        table.add_row(*lines[row::rows])
    yield table


def _initials_differ(report: Report) -> bool:
    return len({label[0] for label in report.labels}) == len(report.labels)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right"
        table.add_column(column, justify=justify, no_wrap=True)
    return table
