"""What outcomes and rounds come to."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from octet.errors import UnavailableError
from ops.bench.load import Outcome
from ops.bench.summary import Percentiles, in_ms, percentiles, require_success, summarize


def outcome(*times_s: float, error: str = "", due_s: float = 0.0) -> Outcome:
    end_s = times_s[-1] if times_s else 0.1
    return Outcome(due_s=due_s, prompt_tokens=10, token_times_s=times_s, end_s=end_s, error=error)


def test_a_summary_counts_tokens_errors_and_kept_service_levels() -> None:
    failed = [outcome(error="UNAVAILABLE"), outcome(0.2, 0.4, error="UNAVAILABLE"), outcome(error="CANCELLED")]
    outcomes = [outcome(0.1, 0.2, 0.3), outcome(0.9, 1.0), outcome(0.1, 1.1), *failed]
    summary = summarize(outcomes, duration_s=2.0, slo_ttft_s=0.5, slo_tpot_s=0.5)
    assert summary.errors == {"UNAVAILABLE": 2, "CANCELLED": 1}
    assert summary.tokens_per_s == pytest.approx(9 / 2)
    assert summary.prompt_tokens_per_s == pytest.approx(30 / 2)
    assert summary.goodput_per_s == pytest.approx(0.5)
    assert summary.ttft_s is not None
    assert summary.ttft_s.p50 == pytest.approx(0.1)
    assert summary.e2e_s is not None
    assert summary.e2e_s.p50 == pytest.approx(1.0)
    assert summary.itl_s is not None
    assert summary.itl_s.p99 == pytest.approx(1.0, rel=0.1)


def test_a_request_of_one_token_has_no_time_per_output_token() -> None:
    summary = summarize([outcome(0.1), outcome(0.1, 0.3, 0.5)], duration_s=1.0, slo_ttft_s=1.0, slo_tpot_s=0.2)
    assert summary.tpot_s is not None
    assert (summary.tpot_s.p50, summary.tpot_s.p99) == pytest.approx((0.2, 0.2))
    assert summary.goodput_per_s == pytest.approx(2.0)


def test_of_nothing_there_are_no_latencies() -> None:
    summary = summarize([outcome(error="UNAVAILABLE"), outcome(error="CANCELLED")], 1.0, 1.0, 1.0)
    assert [summary.ttft_s, summary.tpot_s, summary.itl_s, summary.e2e_s] == [None] * 4
    assert in_ms(summary.ttft_s, 1) == ("-", "-", "-")
    assert in_ms(Percentiles(p50=0.0, p95=0.0123, p99=2.0), 1) == ("0.0", "12.3", "2000.0")


def test_a_load_that_only_failed_says_how_and_why() -> None:
    failed = [outcome(error=random.choice(["UNAVAILABLE", "CANCELLED"])) for _ in range(random.randint(1, 20))]
    failed[0] = dataclasses.replace(failed[0], error="UNAVAILABLE", problem="UNAVAILABLE: no shard is there")
    num_lost = sum(one.error == "UNAVAILABLE" for one in failed)
    told = rf"not one of {len(failed)} requests.*{num_lost} × UNAVAILABLE.*: no shard is there"
    with pytest.raises(UnavailableError, match=told):
        require_success(failed)
    require_success([*failed, outcome(0.1)])
    with pytest.raises(UnavailableError, match="none was sent"):
        require_success([])


def test_percentiles_are_numpys() -> None:
    values = [random.expovariate(1.0) for _ in range(random.randint(2, 500))]
    found = percentiles(values)
    assert [found.p50, found.p95, found.p99] == pytest.approx(np.percentile(values, [50, 95, 99]).tolist())
