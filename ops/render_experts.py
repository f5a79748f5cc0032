"""How `octet status --experts` looks: what every expert did in the telemetry window, and who waited for whom.

Shapes: `L` mixture-of-experts layers, `E` experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from octet.v1 import octet_pb2 as pb
from ops.heatmap import fold, heatmap, legend
from ops.render import level, print_headline

_MAX_LANES = 6
_HOTTEST = 8
_LEGEND_CELLS = 24
_MARGIN = len("layer ") + len(" balance")


def print_experts(status: pb.GetStatusResponse, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    print_headline(
        status,
        f"placement {status.placement_version}  the last {status.window_s:.0f} s: "
        f"{status.window_tokens_per_s:,.1f} tokens/s  balancedness {level(status.balancedness)}",
        console,
    )
    if not status.expert_counts:
        console.print("the router service tells nothing")
        return
    parts: list[RenderableType] = [_load_map(status.expert_counts, console)]
    if status.hottest:
        parts.append(_hottest(status.hottest))
    shards = _pool(status, "experts")
    workers = [*_pool(status, "prefill"), *_pool(status, "decode")]
    if shards or workers:
        parts += [_shards(shards), _workers(workers), _lanes(shards)]
    for part in parts:
        console.print()
        console.print(part)


def _pool(status: pb.GetStatusResponse, name: str) -> list[pb.Member]:
    return [member for pool in status.pools if pool.name == name for member in pool.members]


def _load_map(counts: Sequence[pb.ExpertCounts], console: Console) -> Group:
    """Load relative to the layer's mean; a line per layer, or per two."""
    loads_LE = np.array([of_layer.window_tokens for of_layer in counts], dtype=np.float64)
    mean_L1 = loads_LE.mean(1, keepdims=True)
    ratio_LE = np.divide(loads_LE, mean_L1, out=np.zeros_like(loads_LE), where=mean_L1 > 0)
    room = max(8, console.width - _MARGIN)
    folded_LF, group = fold(ratio_LE, room)
    # A level load shall not look like a hot one: the scale goes to twice the mean at least. One hot expert shall not
    # leave the rest in the dark: what is shown is the root.
    top = max(2.0, float(folded_LF.max(initial=0)))
    colours = console.color_system is not None
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", justify="right")
    of_group = f", the hottest of {group} to a cell" if group > 1 else ""
    table.add_column(f"experts 0 to {loads_LE.shape[1] - 1}{of_group}", no_wrap=True)
    table.add_column("balance", justify="right")
    for line in heatmap(np.sqrt(folded_LF / top), min(2, room // folded_LF.shape[1]), colours):
        least = min(counts[row].balancedness for row in line.rows)
        table.add_row(_layers(counts, line.rows), line.cells, level(least))
    mean_at = max(1, round(_LEGEND_CELLS / np.sqrt(top)))
    ramp = legend(_LEGEND_CELLS, colours)
    scale = Text.assemble("0 ", ramp[:mean_at], " 1 ", ramp[mean_at:], f" {top:.1f} × its layer's mean")
    return Group(table, Padding(scale, (0, 0, 0, len("layer "))))


def _layers(counts: Sequence[pb.ExpertCounts], rows: range) -> str:
    return str(counts[rows[0]].layer) if len(rows) == 1 else f"{counts[rows[0]].layer}+"


def _hottest(hottest: Sequence[pb.HotExpert]) -> Group:
    names = [f"{hot.layer}/{hot.expert}: {hot.tokens:,} ({hot.ratio:.1f}×)" for hot in hottest[:_HOTTEST]]
    title = Text("hottest, as layer/expert: token rows (× its layer's mean)", style="bold")
    return Group(title, Columns(names, padding=(0, 3), equal=True))


def _shards(shards: Sequence[pb.Member]) -> Table:
    table = _table("shard", "busy", "ewma", "frames/s", "rows/s", "experts/frame", "queue", "wait ms")
    for member in shards:
        load = member.load
        if member.HasField("load"):
            table.add_row(
                Text(member.worker_id),
                f"{load.busy_share:.0%}",
                f"{load.busy_ewma:.0%}",
                f"{load.frames_per_s:,.1f}",
                f"{load.rows_per_s:,.1f}",
                f"{load.activated_experts:.1f}",
                f"{load.queue_depth:.2f}",
                f"{load.wait_s * 1e3:.2f}",
            )
        else:
            table.add_row(Text(member.worker_id), "silent")
    return table


def _workers(workers: Sequence[pb.Member]) -> Table:
    table = _table("worker", "busy", "steps/s", "step ms", "for experts", "ewma", "tokens/s", "queue", "KV")
    for member in workers:
        load = member.load
        if member.HasField("load"):
            table.add_row(
                Text(member.worker_id),
                f"{load.busy_share:.0%}",
                f"{load.frames_per_s:,.1f}",
                f"{load.step_s * 1e3:.1f}",
                f"{load.wait_share:.0%}",
                f"{load.wait_ewma:.0%}",
                f"{load.rows_per_s:,.1f}",
                f"{load.queue_depth:.1f}",
                f"{load.kv_share:.0%}",
            )
        else:
            table.add_row(Text(member.worker_id), "silent")
    return table


def _lanes(shards: Sequence[pb.Member]) -> Table:
    """How long each shard let the frames of each attention worker wait for their turn, in ms."""
    names = sorted({lane.worker_id for member in shards for lane in member.load.lanes})
    shown = names[:_MAX_LANES]
    table = _table("wait ms of lane", *shown, *(["…"] if len(names) > len(shown) else []))
    for member in shards:
        waits = {lane.worker_id: f"{lane.wait_s * 1e3:.2f}" for lane in member.load.lanes}
        table.add_row(Text(member.worker_id), *(waits.get(name, "-") for name in shown))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        table.add_column(Text(column), justify=justify, no_wrap=True)
    return table
