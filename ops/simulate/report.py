"""What a simulated run came to, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.frontend.slo import HANDOFF_S
from octet.config import OctetConfig
from ops.simulate.outcome import Result, Run

_SHOWN = 40


def print_result(run: Run, result: Result, config: OctetConfig, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    scaler = config.autoscaler
    refused = f", {result.refused} longer than the KV pages of a worker" if result.refused else ""
    shed = f", {result.shed} shed" if result.shed else ""
    console.print(f"{result.requests} requests over {result.duration_s / 60:.1f} min{refused}{shed}")
    console.print(
        f"[bold]{result.slo_attainment:.2%}[/] kept their targets (TTFT {scaler.target_ttft_s:g} s and "
        f"{scaler.target_ttft_per_1k_tokens_s:g} s per 1,000 prompt tokens; TPOT {scaler.target_tpot_s:g} s, "
        f"{HANDOFF_S:g} s for the hand-off): goodput {result.goodput_per_s:.2f} requests/s, "
        f"{result.tokens_per_s:,.0f} tokens/s"
    )
    pools = Table(box=None, pad_edge=False)
    for column in ("pool", "GPU hours", "mean", "most"):
        pools.add_column(column, justify="left" if column == "pool" else "right")
    for pool, hours in result.gpu_hours_by_pool.items():
        pools.add_row(pool, f"{hours:.1f}", f"{result.mean[pool]:.1f}", str(result.most[pool]))
    pools.add_row("all", f"{result.gpu_hours:.1f}", f"{sum(result.mean.values()):.1f}", "")
    console.print(pools)
    latencies = Table(box=None, pad_edge=False)
    for column in ("", "p50", "p95", "p99"):
        latencies.add_column(column, justify="left" if not column else "right")
    latencies.add_row("TTFT, s", *(f"{x:.2f}" for x in (result.ttft_s.p50, result.ttft_s.p95, result.ttft_s.p99)))
    latencies.add_row(
        "TPOT, ms", *(f"{x * 1e3:.1f}" for x in (result.tpot_s.p50, result.tpot_s.p95, result.tpot_s.p99))
    )
    console.print(latencies)
    console.print(
        f"cost {result.cost:,.0f} at the price given; {result.slots_filled} slots filled by rebalances; most "
        f"reversals of a pool in 10 min: {result.most_reversals}; simulated in {result.wall_s:.1f} s"
    )
    if result.lost:
        console.print(
            f"{result.lost} members were lost: requests began again {result.restarts} times, and {result.failed} failed"
        )
    for action in run.actions[-_SHOWN:]:
        console.print(
            f"{action.at_s / 60:7.1f} min  {action.pool} {action.before} → {action.after}: {action.reason}", style="dim"
        )
