"""What all trials come to, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ops.bench.changes.gaps import Middle, Outcomes, Summary, Trial, summarize
from ops.bench.changes.kinds import KINDS
from ops.bench.machine import Machine

SCHEMA = "octet.changes/1"
_COLUMNS: tuple[tuple[str, Literal["left", "right"]], ...] = (
    ("", "left"),
    ("trials", "right"),
    ("gap ms", "right"),
    ("quiet", "right"),
    ("first token ms", "right"),
    ("quiet", "right"),
    ("went on s", "right"),
    ("done s", "right"),
    ("tokens/s before, during, after", "right"),
    ("as quiet", "right"),
    ("failed", "right"),
    ("others' cores", "right"),
    ("goal", "left"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Of one kind of change."""

    trials: tuple[Trial, ...]
    """Of the changes that succeeded."""
    refused: tuple[str, ...]
    """Why others did not."""
    outcomes: Outcomes

    @property
    def summary(self) -> Summary | None:
        return summarize(self.trials) if self.trials else None

    @property
    def well(self) -> bool:
        return bool(self.trials) and not self.refused and not self.outcomes.problems


def print_results(machine: Machine, results: Mapping[str, Result], streams: int, console: Console) -> None:
    console.print(machine.line)
    console.print(
        f"{streams} streams; the longest of any stream in a window of change and in a quiet one of the same length, "
        "median / most over the trials; others' cores are what processes of nobody here had of them meanwhile"
    )
    table = Table(box=None, pad_edge=False)
    for title, justify in _COLUMNS:
        table.add_column(title, justify=justify)
    for name, result in results.items():
        if (summary := result.summary) is not None:
            table.add_row(*_row(name, result, summary))
    console.print(table)
    for name, result in results.items():
        for problem in (*result.refused, *sorted(set(result.outcomes.problems))):
            console.print(f"[bold red]{name}:[/]", escape(problem))


def _row(name: str, result: Result, summary: Summary) -> list[str]:
    outcomes, goal = result.outcomes, KINDS[name].goal
    verdict = "met" if goal.met(summary) else f"[red]missed: {goal.found_s(summary) * 1e3:.0f} ms[/]"
    return [
        name,
        str(summary.trials),
        _ms(summary.gap_s),
        _ms(summary.quiet_gap_s),
        _ms(summary.wait_s),
        _ms(summary.quiet_wait_s),
        _s(summary.recovered_s) if summary.recovered_s is not None else "",
        _s(summary.duration_s),
        ", ".join(f"{rate:.0f}" for rate in summary.tokens_per_s),
        f"{outcomes.answers - outcomes.different - len(outcomes.problems)} of {outcomes.answers}",
        str(len(outcomes.problems)),
        _s(summary.others),
        f"{goal}: {verdict}",
    ]


def _ms(value: Middle) -> str:
    return f"{value.p50 * 1e3:.0f} / {value.max * 1e3:.0f}"


def _s(value: Middle) -> str:
    return f"{value.p50:.2f} / {value.max:.2f}"


def as_json(machine: Machine, results: Mapping[str, Result]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(machine),
        "results": {name: _as_json(name, result, result.summary) for name, result in results.items()},
    }


def _as_json(name: str, result: Result, summary: Summary | None) -> dict[str, Any]:
    goal = KINDS[name].goal
    judged = summary and {"summary": dataclasses.asdict(summary), "met": goal.met(summary)}
    return dataclasses.asdict(result) | {"goal": str(goal)} | (judged or {})
