"""A breakdown as a table, and as JSON."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from ops.bench.breakdown.analysis import GEMM_PARTS, Breakdown
from ops.bench.breakdown.costs import Costs
from ops.bench.breakdown.floor import Work
from ops.bench.machine import Machine, Rates

SCHEMA = "octet.breakdown/1"
OTHER_GOAL = 0.20

GROUPS: dict[str, tuple[str, ...]] = {
    "attention half": ("attention_half",),
    "attention": ("attention",),
    "norm": ("norm",),
    "linear layers": GEMM_PARTS,
    "gate": ("gate",),
    "plan": ("plan",),
    "serialise": ("dispatch", "pack", "send"),
    "wait: experts": ("experts_wait",),
    "wait: way": ("way_wait",),
    "combine": ("unpack", "combine"),
    "sample": ("sample",),
    "Python": ("batch", "forward", "engine", "messages", "rest"),
}
"""Rows of the table, and the parts of `ops.bench.breakdown.probes` that each is the sum of. Every part is in one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DecodeCase:
    """Steps of one number of sequences."""

    num_sequences: int
    breakdown: Breakdown
    probed_s: float
    """Median step while it was taken apart."""
    plain_s: float
    """Median step without probes, in the same run."""
    experts: Work
    """Of the shard that is asked for most in each layer, over the step's layers."""
    all_experts: Work
    """Of all shards."""
    attention: Mapping[str, Work]
    """Of the attention worker, by part."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCase:
    """Whole chunks of prompts without a past."""

    num_tokens: int
    breakdown: Breakdown


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    machine: Machine
    pools: str
    model: Mapping[str, int]
    machine_rates: Rates
    """Of all cores together."""
    worker_rates: Rates
    """Of the decode worker's threads, alone."""
    shard_rates: Rates
    """Of one shard's threads, while the others are as busy."""
    decode: Sequence[DecodeCase]
    prefill: PrefillCase | None
    costs: Costs
    turn_s: float
    """See `ops.bench.turns`."""

    def floors(self, case: DecodeCase) -> dict[str, float]:
        """Seconds by row of the table; `step` is the whole machine's, if nothing waited for anything."""
        work = case.attention
        linear = [work[part].seconds(self.worker_rates) for part in GEMM_PARTS]
        everything = functools.reduce(operator.add, work.values(), case.all_experts)
        return {
            "attention": work["attention"].seconds(self.worker_rates),
            "linear layers": sum(linear),
            "wait: experts": case.experts.seconds(self.shard_rates),
            "step": everything.seconds(self.machine_rates),
        }


def print_report(report: Report, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    console.print(report.machine.line)
    console.print(report.pools)
    for rates, whose in (
        (report.machine_rates, "all cores"),
        (report.worker_rates, "the decode worker's"),
        (report.shard_rates, "one of the shards at work"),
    ):
        console.print(
            f"{whose}: {rates.bytes_per_s / 1e9:.1f} GB/s, {rates.flops_per_s / 1e9:.0f} GFLOP/s fp32", style="dim"
        )
    console.print(_table(report))
    console.print(_ratios(report))
    console.print(
        f"other: of the step, what is neither GEMM nor exchange wait; goal at most {OTHER_GOAL:.0%}\n"
        "displaced: ready to run while another process had the core",
        style="dim",
    )
    if report.prefill is not None:
        prefill = report.prefill
        rate = prefill.num_tokens / prefill.breakdown.step_s
        console.print(f"a prefill chunk of {prefill.num_tokens} tokens: {rate:.0f} tokens/s")
    errors = ", ".join(f"{name} {error:.0%}" for name, error in report.costs.error.items())
    console.print(f"costs fitted for the simulator, median error: {errors}")


def _table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("ms", no_wrap=True)
    for case in report.decode:
        for column in (f"×{case.num_sequences}", "%", "floor"):
            table.add_column(column, justify="right")
    if report.prefill is not None:
        for column in ("prefill", "%"):
            table.add_column(column, justify="right")
    breakdowns = [case.breakdown for case in report.decode]
    floors = [report.floors(case) for case in report.decode]
    for name, parts in GROUPS.items():
        row = [name]
        for breakdown, floor in zip(breakdowns, floors, strict=True):
            row += [*_cells(breakdown, parts), f"{floor[name] * 1e3:.1f}" if name in floor else ""]
        table.add_row(*row, *(_cells(report.prefill.breakdown, parts) if report.prefill else ()))
    step = ["step"]
    for breakdown, floor in zip(breakdowns, floors, strict=True):
        step += [f"{breakdown.step_s * 1e3:.1f}", "100", f"{floor['step'] * 1e3:.1f}"]
    table.add_section()
    table.add_row(*step, *([f"{report.prefill.breakdown.step_s * 1e3:.0f}", "100"] if report.prefill else ()))
    return table


def _ratios(report: Report) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("sequences", "other", "displaced", "step ÷ floor", "probes cost"):
        table.add_column(column, justify="right")
    for case in report.decode:
        table.add_row(
            str(case.num_sequences),
            f"{case.breakdown.other_share:.0%}",
            f"{case.breakdown.displaced_s / case.breakdown.step_s:.0%}",
            f"{case.breakdown.step_s / report.floors(case)['step']:.1f}",
            f"{case.probed_s / case.plain_s - 1:+.0%}",
        )
    return table


def _cells(breakdown: Breakdown, parts: Sequence[str]) -> list[str]:
    seconds = sum(breakdown.parts.get(part, 0.0) for part in parts)
    return [f"{seconds * 1e3:.1f}", f"{seconds / breakdown.step_s:.0%}".removesuffix("%")]


def as_json(report: Report) -> dict[str, Any]:
    """See docs/benchmarks/breakdown.md. Times are seconds."""
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(report.machine),
        "pools": report.pools,
        "model": dict(report.model),
        "rates": {
            "machine": dataclasses.asdict(report.machine_rates),
            "decode_worker": dataclasses.asdict(report.worker_rates),
            "shard": dataclasses.asdict(report.shard_rates),
        },
        "decode": [
            {
                "sequences": case.num_sequences,
                "attended": case.breakdown.num_attended,
                "steps": case.breakdown.num_steps,
                "step_s": case.breakdown.step_s,
                "plain_step_s": case.plain_s,
                "parts_s": case.breakdown.parts,
                "displaced_s": case.breakdown.displaced_s,
                "other_share": case.breakdown.other_share,
                "floor_s": report.floors(case),
                "experts_read": case.all_experts.num_bytes / report.model["expert_bytes"],
            }
            for case in report.decode
        ],
        "prefill": None
        if report.prefill is None
        else {
            "tokens": report.prefill.num_tokens,
            "step_s": report.prefill.breakdown.step_s,
            "parts_s": report.prefill.breakdown.parts,
        },
        "costs": dataclasses.asdict(report.costs),
        "turn_s": report.turn_s,
    }
