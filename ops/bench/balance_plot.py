"""What `octet bench balance` measures as a picture."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from ops.bench.plot import AMBER, BLUE, MUTED, STYLE, TEAL


class Levels(NamedTuple):
    """Balancedness of one division of the experts, mean over the layers."""

    num_shards: int
    num_slots: int
    greedy: float
    first: float
    drifted: float
    moved: float


class BatchLevels(NamedTuple):
    """Balancedness of the rows of batches of one size, mean over the layers."""

    num_tokens: int
    in_turn: float
    chosen: float


def draw_balance(file: pathlib.Path, cases: Sequence[Levels], batches: Sequence[BatchLevels]) -> None:
    """Write a PNG: placements by shards and slots, and choices of replicas by tokens. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
        placements, choices = figure.subplots(1, 2, width_ratios=[1.6, 1.0])
        bars = {
            "EPLB's greedy steps": ([case.greedy for case in cases], MUTED),
            "first placement": ([case.first for case in cases], BLUE),
            "a fifth of the experts have swapped loads": ([case.drifted for case in cases], AMBER),
            "a tenth of the slots filled anew": ([case.moved for case in cases], TEAL),
        }
        width = 0.8 / len(bars)
        for number, (name, (levels, colour)) in enumerate(bars.items()):
            places = [at + (number - (len(bars) - 1) / 2) * width for at in range(len(cases))]
            placements.bar(places, levels, width * 0.92, color=colour, label=name)
        labels = [f"{case.num_shards} shards\n{case.num_slots} slots" for case in cases]
        placements.set_xticks(range(len(cases)), labels)
        placements.grid(axis="x", visible=False)
        placements.set_title("Placements", loc="left")
        placements.set_ylabel("balancedness (mean ÷ max over shards)")
        sizes = [batch.num_tokens for batch in batches]
        choices.plot(sizes, [batch.in_turn for batch in batches], "o-", color=MUTED, label="replicas in turn")
        choices.plot(sizes, [batch.chosen for batch in batches], "o-", color=TEAL, label="chosen for the batch")
        choices.set_xscale("log", base=2)
        choices.set_xticks(sizes, [f"{size:,}" for size in sizes])
        choices.set_xlabel("tokens of a batch, 16 shards of 12 slots")
        choices.set_title("Rows of a batch", loc="left")
        placements.set_ylim(0, 1.22)
        placements.set_yticks([0, 0.25, 0.5, 0.75, 1])
        placements.legend(frameon=False, loc="upper left", ncols=2, fontsize=8.5)
        choices.set_ylim(0, 1.02)
        choices.legend(frameon=False, loc="lower right", fontsize=8.5)
        figure.savefig(file)
