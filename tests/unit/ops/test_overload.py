from __future__ import annotations

import pytest

from ops.bench.load import Outcome
from ops.bench.overload import to_row


def outcome(sent_s: float, end_s: float, error: str = "") -> Outcome:
    times = () if error else (end_s / 2, end_s)
    return Outcome(sent_s=sent_s, prompt_tokens=1, token_times_s=times, end_s=end_s, error=error)


def test_goodput_is_what_was_complete_in_the_second_half() -> None:
    outcomes = [outcome(0.0, 1.0), outcome(4.0, 1.5), outcome(8.0, 1.0), outcome(9.5, 1.0)]
    assert to_row(1.0, 0.4, outcomes, 10.0, []).goodput_per_s == pytest.approx(2 / 5)


def test_what_was_refused_and_what_was_late_are_counted_apart() -> None:
    outcomes = [
        outcome(0.0, 1.0),
        outcome(1.0, 0.01, "RESOURCE_EXHAUSTED"),
        outcome(2.0, 0.03, "RESOURCE_EXHAUSTED"),
        outcome(3.0, 5.0, "DEADLINE_EXCEEDED"),
    ]
    row = to_row(10.0, 4.0, outcomes, 10.0, [0.01, 0.03])
    assert (row.requests, row.refused, row.late) == (4, 2, 1)
    assert row.refusal_s.p50 == pytest.approx(0.02)
    assert row.bystander_refused == 2
    assert row.bystander_refusal_s.p50 == pytest.approx(0.02)
    assert row.ttft_s.p50 == pytest.approx(0.5)
