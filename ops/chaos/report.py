"""What came of schedules, as text and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ops.bench.machine import Machine
from ops.chaos.figures import by_kind, costs, quiet_gap_s, resumed
from ops.chaos.run import Verdict
from ops.chaos.schedule import Rebalance, Scale

SCHEMA = "octet.chaos/1"


def print_verdict(verdict: Verdict, console: Console) -> None:
    """One schedule: a line, one for each fault, and one for each violation."""
    history = verdict.history
    tokens = sum(len(delta.token_ids) for stream in history.streams for delta in stream.deltas)
    epochs = f"epoch {history.before.epoch} → {history.after.epoch}"
    mark = ("VIOLATED", "red") if verdict.violations else ("kept", "green")
    # Assembled: what a file or a server names is no markup.
    line = Text.assemble((history.name, "bold"), ": ", mark, f"; {len(history.streams)} streams, {tokens} tokens, ")
    line.append(f"{resumed(history.streams)}, {epochs}, {history.after.at_s - history.begin_s:.1f} s")
    console.print(line)
    for fault in history.faults:
        at_s, lasted_s = fault.at_s - history.begin_s, fault.until_s - fault.at_s
        note = f" ({fault.note})" if fault.note else ""
        console.print(f"  {at_s:6.2f} s  {fault.what}: {lasted_s:.2f} s{note}", markup=False)
    if history.host_lost and history.after.unplaced:
        console.print(f"  {history.after.state}: no node that is left has room for all who were lost")
    for violation in verdict.violations:
        console.print(Text.assemble("  ", ("violation", "red"), f" {violation}"))


def print_figures(machine: Machine, verdicts: Sequence[Verdict], console: Console) -> None:
    """All schedules together: what each kind of fault cost, where it was alone."""
    console.print(machine.line)
    found = by_kind(cost for verdict in verdicts for cost in costs(verdict.history))
    table = Table(box=None, pad_edge=False)
    table.add_column("fault")
    for title in ("times", "gap ms p50", "max", "first token ms p50", "max", "tokens/s before", "during", "after"):
        table.add_column(title, justify="right")
    for kind, cost in found.items():
        waits = [
            f"{seconds * 1e3:.0f}" for seconds in (cost.gap_p50_s, cost.gap_max_s, cost.wait_p50_s, cost.wait_max_s)
        ]
        table.add_row(kind, str(cost.faults), *waits, *(f"{r:.0f}" for r in (cost.before, cost.during, cost.after)))
    console.print(table)
    streams = [stream for verdict in verdicts for stream in verdict.history.streams]
    violated = sum(bool(verdict.violations) for verdict in verdicts)
    quiet_s, where = max(((quiet_gap_s(v.history), v.history.name) for v in verdicts), default=(0.0, "none"))
    console.print(
        f"{len(verdicts)} schedules, {_counts(verdicts)}, {len(streams)} streams; "
        f"{resumed(streams)}; longest gap without a fault {quiet_s * 1e3:.0f} ms ({where}); "
        f"{violated} schedules with violations"
    )


def _counts(verdicts: Sequence[Verdict]) -> str:
    """Changes are no faults, and what was never reached, or could not be done, struck nobody."""
    struck = changed = missed = 0
    for verdict in verdicts:
        changes = {event.kind for event in verdict.schedule.events if isinstance(event, Scale | Rebalance)}
        for fault in verdict.history.faults:
            missed += not fault.fired
            changed += fault.fired and fault.kind in changes
            struck += fault.fired and fault.kind not in changes
    return f"{struck} faults and {changed} changes ({missed} more did not come about)"


def as_json(machine: Machine, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Without the streams' tokens."""
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(machine),
        "figures": {
            kind: dataclasses.asdict(cost)
            for kind, cost in by_kind(cost for verdict in verdicts for cost in costs(verdict.history)).items()
        },
        "runs": [
            {
                "schedule": verdict.schedule.model_dump(mode="json"),
                "faults": [dataclasses.asdict(fault) for fault in verdict.history.faults],
                "streams": len(verdict.history.streams),
                "resumed": dataclasses.asdict(resumed(verdict.history.streams)),
                "quiet_gap_s": quiet_gap_s(verdict.history),
                "no_room": verdict.history.host_lost and verdict.history.after.unplaced > 0,
                "violations": [dataclasses.asdict(violation) for violation in verdict.violations],
            }
            for verdict in verdicts
        ],
    }
