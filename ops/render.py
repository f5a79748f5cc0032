"""How status and progress look on a terminal. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import sys
from typing import Any, Literal

import numpy as np
from google.protobuf import json_format
from rich.console import Console
from rich.table import Table
from rich.text import Text

from octet.v1 import octet_pb2 as pb
from ops.changes import print_changes
from ops.heatmap import fold, heatmap

STDERR = sys.stderr
_MAX_LAYERS = 12
"""More than these are left to `octet status --experts`."""
_BESIDE_BARS = 40
_QUANTILES = (0.5, 0.95, 0.99)


def as_json(message: Any) -> str:
    """A protobuf message with every field, under its proto name."""
    return json_format.MessageToJson(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def print_json(message: Any, console: Console) -> None:
    console.out(as_json(message), highlight=False)


def print_status(status: pb.GetStatusResponse, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    print_headline(
        status,
        f"epoch {status.epoch}  placement {status.placement_version}  "
        f"up {status.uptime_s:.0f} s  tokens {status.tokens_served}\n"
        f"requests: {status.live_requests} live, {status.requests_finished} finished, "
        f"{status.requests_failed} failed, {status.requests_cancelled} cancelled",
        console,
    )
    if latencies := _latencies(status.request_histograms):
        console.print(latencies)
    if status.strangers_refused or status.messages_dropped:
        console.print(
            f"between members: {status.strangers_refused} strangers refused, {status.messages_dropped} messages dropped"
        )
    console.print(_members(status))
    print_changes(status, console)
    if status.expert_counts:
        console.print(_experts_in_short(status))
        if len(status.expert_counts) <= _MAX_LAYERS:
            console.print(_experts(status, console.width))


def print_headline(status: pb.GetStatusResponse, told: str, console: Console) -> None:
    """The state, why it is so, and what else is told. As it is: what a server says is no markup."""
    reason = f" ({status.reason})" if status.reason else ""
    line = console.render_str(f"{status.state}{reason}  {told}", markup=False, emoji=False)
    line.stylize("bold", 0, len(status.state))
    console.print(line)


def quantile(histogram: pb.Histogram, q: float) -> float:
    """Of values of which there are some: within a bucket they are taken to lie evenly, as Prometheus's
    `histogram_quantile` does; what lies beyond the last bound is taken for that."""
    rank, below, least = q * sum(histogram.counts), 0, 0.0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        if count and below + count >= rank:
            return least + (bound - least) * (rank - below) / count
        below, least = below + count, bound
    return least


def _latencies(told: pb.RequestHistograms) -> str:
    """One line about all requests since the frontend started; empty before the first token."""
    kinds = (("first token", told.ttft_s), ("between tokens", told.itl_s), ("whole answer", told.e2e_s))
    parts = [
        f"{name} {' / '.join(f'{quantile(histogram, q) * 1e3:.0f}' for q in _QUANTILES)}"
        for name, histogram in kinds
        if sum(histogram.counts)
    ]
    return f"latencies, ms (p50 / p95 / p99): {', '.join(parts)}" if parts else ""


def _members(status: pb.GetStatusResponse) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("member", "state", "node", "pid", "MiB", "KV free", "run", "wait", "tokens", "saved"):
        justify: Literal["left", "right"] = "left" if column in ("member", "state", "node") else "right"
        table.add_column(column, justify=justify, no_wrap=True)
    for pool in status.pools:
        for member in pool.members:
            pages = f"{member.kv_pages_free}/{member.kv_pages_total}" if member.kv_pages_total else ""
            attention = pool.name != "experts"
            table.add_row(
                Text(member.worker_id),
                Text(member.state),
                Text(member.node_id[:6]),
                str(member.pid),
                f"{member.resident_bytes / 2**20:.0f}",
                pages,
                str(member.running) if attention else "",
                str(member.waiting) if attention else "",
                str(member.tokens),
                _saved(pool.name, member),
            )
    return table


def _saved(pool: str, member: pb.Member) -> str:
    """The prefix cache's hit rate, by tokens; the share of drafts that were accepted, where any were made."""
    if pool == "prefill":
        return _share(member.cached_tokens, member.cached_tokens + member.tokens)
    return _share(member.accepted_tokens, member.drafted_tokens) if member.drafted_tokens else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"


def _experts_in_short(status: pb.GetStatusResponse) -> str:
    hottest = status.hottest[0] if status.hottest else None
    hot = f"  hottest {hottest.layer}/{hottest.expert} ({hottest.ratio:.1f}×)" if hottest else ""
    return (
        f"the last {status.window_s:.0f} s: {status.window_tokens_per_s:,.1f} tokens/s  "
        f"balancedness {level(status.balancedness)}{hot}"
    )


def level(balancedness: float) -> str:
    """Where no shard that is there has served anything, there is none."""
    return f"{balancedness:.3f}" if balancedness else "-"


def _experts(status: pb.GetStatusResponse, width: int) -> Table:
    """One row per layer: a bar per expert, or per few, as high as its share of the layer's busiest."""
    table = Table(box=None, pad_edge=False, title="tokens by expert", title_justify="left")
    for column in ("layer", "experts", "busiest", "balancedness"):
        table.add_column(column, justify="left" if column == "experts" else "right", no_wrap=True)
    for counts in status.expert_counts:
        most = max(counts.tokens, default=0)
        shares_1E = np.array([counts.tokens], dtype=np.float64) / max(most, 1)
        (bars,) = heatmap(fold(shares_1E, max(8, width - _BESIDE_BARS))[0], 1, colours=False)
        busiest = f"{list(counts.tokens).index(most)} ({most})" if most else "-"
        table.add_row(str(counts.layer), bars.cells, busiest, level(counts.balancedness))
    return table
