"""What a fault cost, by what streams saw; and the page that shows it."""

from __future__ import annotations

import xml.etree.ElementTree

import pytest

from ops.chaos.figures import by_kind, costs, quiet_gap_s
from ops.chaos.history import Delta, History, Injected, Sample, Stream
from ops.chaos.run import Verdict
from ops.chaos.schedule import Schedule
from ops.chaos.timeline import timeline
from ops.chaos.violations import Violation
from tests.unit.ops.chaos.histories import history, stream


def told(*times_s: float) -> Stream:
    """A token at each of these times."""
    deltas = [Delta(at_s=at_s, choice=0, offset=index, token_ids=(5,)) for index, at_s in enumerate(times_s)]
    return stream(sent_s=times_s[0], deltas=deltas, endings=[(times_s[-1], "OK")])


def fault(at_s: float, until_s: float, kind: str = "kill decode", fired: bool = True) -> Injected:
    return Injected(at_s=at_s, what="kill <decode-0>", kind=kind, until_s=until_s, fired=fired)


def run(*streams: Stream, faults: list[Injected]) -> History:
    return history(*streams, begin_s=100.0, end_s=110.0, faults=faults)


def test_a_fault_costs_the_longest_gap_that_touches_it() -> None:
    steady = [100 + tenth / 10 for tenth in range(100)]
    (cost,) = costs(run(told(*steady), told(100.0, 103.0, 104.5, 105.0), faults=[fault(104.0, 104.5)]))
    assert cost.gap_s == 1.5
    assert cost.before == pytest.approx(10.5)
    assert cost.during == pytest.approx(11)
    assert cost.after == pytest.approx(10, abs=0.3)


def test_faults_at_the_same_time_are_nobodys_cost() -> None:
    both = [fault(104.0, 104.5), fault(104.25, 105.0, "kill experts")]
    assert costs(run(told(100.0, 109.0), faults=both)) == []
    assert len(costs(run(told(100.0, 109.0), faults=[both[0], fault(104.25, 105.0, fired=False)]))) == 1


def test_kinds_are_summed_up_by_median_and_maximum() -> None:
    apart = run(told(100.0, 102.0, 102.5, 106.0, 107.5), faults=[fault(102.1, 102.2), fault(106.5, 106.6)])
    summary = by_kind(costs(apart))["kill decode"]
    assert (summary.faults, summary.gap_p50_s, summary.gap_max_s) == (2, 2.5, 3.5)


def test_quiet_gaps_are_those_that_touch_no_fault() -> None:
    assert quiet_gap_s(run(told(100.0, 101.0, 104.0, 105.5), faults=[fault(102.0, 102.1)])) == 1.5


def test_time_in_which_a_user_was_away_is_no_gap() -> None:
    left = told(100.0, 101.0, 104.0, 104.5)
    left.away_s.append((101.0, 103.75))
    found = run(left, faults=[fault(102.0, 103.9)])
    assert costs(found)[0].gap_s == 0.5
    assert quiet_gap_s(found) == 1.0
    left.away_s.clear()
    assert costs(found)[0].gap_s == 3.0


def test_the_timeline_names_faults_epochs_gaps_and_violations() -> None:
    samples = [
        Sample(at_s=101.0, epoch=1, state="READY", sizes={}),
        Sample(at_s=103.0, epoch=2, state="READY", sizes={}),
    ]
    found = history(
        stream(calls_s=[100.0, 101.5]), told(100.0, 102.0), begin_s=100.0, faults=[fault(101.0, 102.0)], samples=samples
    )
    violation = Violation(kind="usage", subject="r0", found="a <b>")
    found.streams[0].away_s.append((101.1, 101.5))
    page = timeline([Verdict(schedule=Schedule(), history=found, violations=(violation,))])
    for told_there in (
        "kill &lt;decode-0&gt;",
        "epoch 2",
        "2000 ms",
        "1 resumed (1 of them",
        "away for 400 ms",
        "usage: r0: a &lt;b&gt;",
        "violated",
    ):
        assert told_there in page
    drawing = page[page.index("<svg") : page.index("</svg>") + len("</svg>")]
    assert len(list(xml.etree.ElementTree.fromstring(drawing).iter("rect"))) >= 4
