"""What becomes of goodput and of refusals, and what a load that comes to nothing says."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections import Counter

import pytest

from octet.errors import UnavailableError
from ops.bench.load import Outcome
from ops.bench.overload import OverloadOptions, bench_overload, to_row
from tests.unit.ops.played import Answering, playing


def outcome(due_s: float, end_s: float, error: str = "") -> Outcome:
    times = () if error else (end_s / 2, end_s)
    return Outcome(due_s=due_s, prompt_tokens=1, token_times_s=times, end_s=end_s, error=error)


def test_goodput_is_what_was_complete_in_the_second_half() -> None:
    outcomes = [outcome(0.0, 1.0), outcome(4.0, 1.5), outcome(8.0, 1.0), outcome(9.5, 1.0)]
    assert to_row(1.0, outcomes, 10.0, []).goodput_per_s == pytest.approx(2 / 5)


def test_what_was_refused_and_what_was_late_are_counted_apart() -> None:
    outcomes = [
        outcome(0.0, 1.0),
        outcome(1.0, 0.01, "RESOURCE_EXHAUSTED"),
        outcome(2.0, 0.03, "RESOURCE_EXHAUSTED"),
        outcome(3.0, 5.0, "DEADLINE_EXCEEDED"),
    ]
    row = to_row(10.0, outcomes, 10.0, [0.01, 0.03])
    assert (row.requests, row.refused, row.late, row.failed) == (4, 2, 1, {})
    assert row.refusal_s is not None
    assert row.refusal_s.p50 == pytest.approx(0.02)
    assert row.bystander_refused == 2
    assert row.bystander_refusal_s is not None
    assert row.bystander_refusal_s.p50 == pytest.approx(0.02)
    assert row.ttft_s is not None
    assert row.ttft_s.p50 == pytest.approx(0.5)


def test_what_failed_otherwise_is_not_late() -> None:
    codes = random.choices(["UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED"], k=20)
    row = to_row(1.0, [outcome(float(at_s), 0.5, code) for at_s, code in enumerate(codes)], 20.0, [])
    assert row.late == codes.count("DEADLINE_EXCEEDED")
    assert row.failed == Counter(code for code in codes if code != "DEADLINE_EXCEEDED")
    assert (row.ttft_s, row.refusal_s, row.bystander_refusal_s) == (None, None, None)


def test_what_is_offered_is_what_was_sent() -> None:
    lags_s = [random.random() for _ in range(9)]
    in_time = [dataclasses.replace(outcome(float(at_s), 0.1), lag_s=lag_s) for at_s, lag_s in enumerate(lags_s)]
    row = to_row(1.0, in_time, 10.0, [])
    assert row.offered_per_s == pytest.approx(0.9)
    assert row.max_lag_s == max(lags_s)
    behind = dataclasses.replace(outcome(10.0, 9.0), lag_s=5.0)
    row = to_row(1.0, [*in_time, behind], 10.0, [])
    assert row.offered_per_s == pytest.approx(10 / 15)
    assert row.max_lag_s == 5.0


async def test_where_nothing_succeeds_no_rate_is_made_of_it() -> None:
    options = OverloadOptions(
        streams=2,
        multiples=(1.0,),
        seconds=1.0,
        deadline_s=5.0,
        prompt_tokens=3,
        new_tokens=2,
        seed=random.getrandbits(9),
    )
    async with playing(Answering(error="the model is gone")) as address:
        with pytest.raises(UnavailableError, match=r"not one of 8 requests succeeded: 8 × INTERNAL.*the model is gone"):
            await asyncio.to_thread(bench_overload, address, options, None)
