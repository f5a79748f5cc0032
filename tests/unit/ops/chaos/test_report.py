"""What came of a schedule, as text."""

from __future__ import annotations

import io

from rich.console import Console

from ops.chaos.report import print_verdict
from ops.chaos.run import Verdict
from ops.chaos.schedule import Schedule
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
