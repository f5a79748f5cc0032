"""What came of a schedule, as text."""

from __future__ import annotations

import io

from rich.console import Console

from ops.bench.machine import Machine
from ops.chaos.history import Injected
from ops.chaos.report import print_figures, print_verdict
from ops.chaos.run import Verdict
from ops.chaos.schedule import Arm, Event, Kill, Rebalance, Scale, Schedule
from ops.chaos.violations import Violation
from tests.unit.ops.chaos.histories import history


def test_a_schedule_and_what_it_violated_are_named_as_they_are() -> None:
    violation = Violation(kind="usage", subject="r0", found="[/x] [abc]")
    out = io.StringIO()
    verdict = Verdict(schedule=Schedule(), history=history(name="[/y] [abc]"), violations=(violation,))
    print_verdict(verdict, Console(file=out, width=200))
    told = out.getvalue().splitlines()
    assert told[0].startswith("[/y] [abc]: VIOLATED; 1 streams, 4 tokens, 0 resumed")
    assert told[1] == "  violation usage: r0: [/x] [abc]"


def test_faults_that_never_struck_and_changes_are_not_counted_as_faults() -> None:
    events: list[tuple[Event, bool]] = [
        (Kill(at_s=1, target="decode"), True),
        (Arm(at_s=1, target="experts", point="serve"), False),
        (Scale(at_s=2, pool="experts", by=-1), True),
        (Rebalance(at_s=3), True),
        (Rebalance(at_s=3), False),
    ]
    faults = [
        Injected(at_s=100 + event.at_s, what="", kind=event.kind, until_s=101 + event.at_s, fired=fired)
        for event, fired in events
    ]
    schedule = Schedule(events=tuple(event for event, _ in events))
    verdicts = [Verdict(schedule=schedule, history=history(faults=faults), violations=())] * 2
    machine = Machine(cpu="a", cores=2, memory_gib=1, gpu="", python="3", torch="2", date="2026-12-01", load=0.0)
    out = io.StringIO()
    print_figures(machine, verdicts, Console(file=out, width=300))
    assert "2 schedules, 2 faults and 4 changes (4 more did not come about), 2 streams; " in out.getvalue()
