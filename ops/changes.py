"""Changes of a running cluster on the command line: what is asked for, and how it is shown."""

from __future__ import annotations

import collections
import datetime
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.members import POOLS
from octet.errors import RequestError
from octet.v1 import octet_pb2 as pb

_SHOWN = 5


def parse_sizes(texts: Sequence[str]) -> dict[str, int]:
    """`experts=4 decode=2` by pool. Raises: RequestError."""
    sizes: dict[str, int] = {}
    for text in texts:
        pool, _, size = text.partition("=")
        if pool not in POOLS or pool in sizes or not (size.isascii() and size.isdecimal()):
            raise RequestError("sizes", repr(text), f"POOL=SIZE, once for each of {', '.join(POOLS)} at most")
        sizes[pool] = int(size)
    return sizes


def print_rebalance(answer: pb.RebalanceResponse, *, dry_run: bool, console: Console | None = None) -> None:
    """The moves, by the shards they go to, and what they are worth."""
    console = console or Console(highlight=False)
    if not answer.moves:
        console.print(f"nothing to move: {escape(answer.reason)}")
        return
    verb = "would move" if dry_run else "moved"
    console.print(
        f"{len(answer.moves)} experts {verb} ({answer.bytes / 2**20:.1f} MiB): balancedness "
        f"{answer.balancedness_before:.3f} → {answer.balancedness_after:.3f}, "
        f"{answer.relative_gain:.1%} off the fullest shards; placement {answer.placement_version}"
    )
    by_way: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for move in answer.moves:
        by_way[getattr(move, "from") or "checkpoint", move.to].append(f"{move.layer}:{move.expert}")
    table = Table(box=None, pad_edge=False)
    for column in ("from", "to", "experts", "layer:expert"):
        table.add_column(column, justify="right" if column == "experts" else "left", no_wrap=column != "layer:expert")
    for (source, target), moved in sorted(by_way.items()):
        table.add_row(source, target, str(len(moved)), " ".join(moved))
    console.print(table)


def print_changes(status: pb.GetStatusResponse, console: Console) -> None:
    """The last changes, newest first."""
    if status.change_under_way:
        console.print(f"under way: {escape(status.change_under_way)}")
    if status.waiting_for:
        console.print(f"waiting for nodes with room for {escape(status.waiting_for)}", highlight=False)
    for change in list(reversed(status.changes))[:_SHOWN]:
        at = datetime.datetime.fromtimestamp(change.at_s, tz=datetime.UTC).astimezone().strftime("%H:%M:%S")
        outcome = change.outcome if change.succeeded else f"failed: {change.outcome}"
        line = f"{at} {change.kind} ({change.reason}) in {change.duration_s:.1f} s: {outcome}"
        console.print(escape(line), highlight=False)
