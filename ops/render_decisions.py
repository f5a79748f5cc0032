"""How the autoscaler's decisions look on a terminal."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from octet.v1 import octet_pb2 as pb


def print_decisions(status: pb.GetStatusResponse, console: Console | None = None) -> None:
    """What it thinks of each pool now, and what it has done and why."""
    console = console or Console(highlight=False)
    if not status.autoscaler_enabled:
        console.print("The autoscaler is off (autoscaler.enabled).")
        return
    console.print(_table("now", status.latest_decisions, outcome=False))
    if status.decisions:
        console.print(_table("done", status.decisions, outcome=True))


def _table(title: str, decisions: object, *, outcome: bool) -> Table:
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    for column in ("ago", "pool", "size", "wanted", "target", "why", *(("outcome",) if outcome else ())):
        justify: Literal["left", "right"] = "left" if column in ("pool", "why", "outcome") else "right"
        table.add_column(column, justify=justify, overflow="fold")
    for one in decisions:  # type: ignore[attr-defined]
        cells = [f"{one.age_s:.0f} s", one.pool, str(one.current), str(one.wanted), str(one.target), one.reason]
        # As they are: what a server says is no markup.
        table.add_row(*map(Text, [*cells, *([one.outcome or "goes on"] if outcome else [])]))
    return table
