"""What was measured, what was simulated, and their quotients, each within one round. Pure."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.bench.breakdown.costs import Costs
from ops.bench.machine import Machine
from ops.bench.spread import Spread, spread

SCHEMA = "octet.simulator/1"
GOAL = (0.8, 1.2)

Sizes = tuple[int, int, int]
"""Prefill workers, decode workers, shards."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of a closed loop, as its clients see it. Latencies are medians."""

    tokens_per_s: float
    ttft_s: float
    tpot_s: float


FIGURES = tuple(field.name for field in dataclasses.fields(Figures))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What processes that are no members take of the cores; see `ops.simulate.costs.Costs`."""

    cores: float
    per_token_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One size in one round."""

    sizes: Sizes
    measured: Figures
    cores: Mapping[str, float]
    """That each pool used meanwhile, and all processes that are no members."""
    simulated: Figures
    costs: Costs
    """Measured before and after."""
    others: Others
    """Measured with half the streams."""

    def ratio(self, figure: str) -> float:
        """Simulated ÷ measured."""
        simulated: float = getattr(self.simulated, figure)
        measured: float = getattr(self.measured, figure)
        return simulated / measured


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    turn_s: float
    """See `ops.bench.turns`."""
    compared: Sequence[Compared]


def spreads(rounds: Sequence[Round]) -> dict[Sizes, dict[str, Spread]]:
    """Of the quotients of each figure over the rounds."""
    by_size: dict[Sizes, list[Compared]] = {}
    for one in rounds:
        for compared in one.compared:
            by_size.setdefault(compared.sizes, []).append(compared)
    return {
        sizes: {figure: spread([one.ratio(figure) for one in found]) for figure in FIGURES}
        for sizes, found in by_size.items()
    }


def print_report(machine: Machine, rounds: Sequence[Round], console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    console.print(machine.line)
    console.print(_table(rounds))
    console.print(
        f"prefill + decode + shards; medians of {len(rounds)} rounds, and ranges of simulated ÷ measured in one round. "
        f"Goal: within {GOAL[0]} to {GOAL[1]}"
    )
    others = [compared.others for one in rounds for compared in one.compared]
    idle = spread([one.cores for one in others])
    each_s = spread([one.per_token_s for one in others])
    console.print(
        f"others than members: {idle.median:.2f} cores ({idle.lowest:.2f} to {idle.highest:.2f}), and for each token "
        f"{each_s.median * 1e3:.2f} ms ({each_s.lowest * 1e3:.2f} to {each_s.highest * 1e3:.2f})"
    )


def _table(rounds: Sequence[Round]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("pools", "tokens/s", "÷ measured", "range", "TPOT ms", "÷ measured", "range"):
        table.add_column(column, justify="left" if column == "pools" else "right", no_wrap=True)
    for sizes, ratios in spreads(rounds).items():
        found = [one.measured for each in rounds for one in each.compared if one.sizes == sizes]
        tokens_per_s = statistics.median(figures.tokens_per_s for figures in found)
        tpot_s = statistics.median(figures.tpot_s for figures in found)
        table.add_row(
            " + ".join(map(str, sizes)),
            f"{tokens_per_s:.1f}",
            *_cells(ratios["tokens_per_s"]),
            f"{tpot_s * 1e3:.1f}",
            *_cells(ratios["tpot_s"]),
        )
    return table


def as_json(machine: Machine, loop: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, Any]:
    """Times are seconds."""
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(machine),
        "loop": loop,
        "rounds": [dataclasses.asdict(one) for one in rounds],
        "ratios": [
            {"sizes": sizes, **{figure: dataclasses.asdict(ratio) for figure, ratio in ratios.items()}}
            for sizes, ratios in spreads(rounds).items()
        ],
    }


def _cells(ratio: Spread) -> tuple[str, str]:
    return f"{ratio.median:.2f}", f"{ratio.lowest:.2f} to {ratio.highest:.2f}"
