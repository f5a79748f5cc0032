"""Load generation and what is made of its outcomes."""

from __future__ import annotations

import json
import pathlib

import pytest

from octet.errors import ConfigError
from ops.bench.load import Outcome, poisson, read_trace, summarize
from ops.bench.serve import LoadOptions, bench_serve


def _outcome(*times_s: float, error: str = "") -> Outcome:
    return Outcome(prompt_tokens=10, token_times_s=times_s, end_s=times_s[-1] if times_s else 0.1, error=error)


def test_poisson_arrivals_come_at_the_rate() -> None:
    arrivals = poisson(rate=5.0, num_requests=4000, prompt_tokens=3, new_tokens=2, seed=1)
    assert arrivals[-1].at_s == pytest.approx(4000 / 5.0, rel=0.1)
    assert [a.at_s for a in arrivals] == sorted(a.at_s for a in arrivals)


def test_a_trace_is_scaled_in_time_and_length_and_cut_to_the_context(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace.jsonl"
    entries = [(0, 1000, 100), (4000, 90000, 50), (9000, 10, 1)]
    keys = ("timestamp", "input_length", "output_length")
    file.write_text("".join(json.dumps(dict(zip(keys, entry, strict=True))) + "\n" for entry in entries))
    arrivals = read_trace(file, num_requests=2, time_scale=2.0, length_scale=0.1, max_len=500)
    assert [(a.at_s, a.prompt_tokens, a.new_tokens) for a in arrivals] == [(0.0, 100, 10), (2.0, 495, 5)]


def test_a_summary_counts_tokens_errors_and_kept_service_levels() -> None:
    outcomes = [_outcome(0.1, 0.2, 0.3), _outcome(0.9, 1.0), _outcome(0.1, 1.1), _outcome(error="UNAVAILABLE")]
    summary = summarize(outcomes, duration_s=2.0, slo_ttft_s=0.5, slo_tpot_s=0.5)
    assert summary.errors == {"UNAVAILABLE": 1}
    assert summary.tokens_per_s == pytest.approx(3.5)
    assert summary.goodput_per_s == pytest.approx(0.5)
    assert summary.ttft_s[0] == pytest.approx(0.1)
    assert summary.itl_s[2] == pytest.approx(1.0, rel=0.1)


def test_two_kinds_of_load_at_once_are_refused() -> None:
    options = LoadOptions(
        streams=1,
        rate=1.0,
        trace=None,
        requests=1,
        prompt_tokens=1,
        new_tokens=1,
        time_scale=1.0,
        length_scale=1.0,
        slo_ttft_s=1.0,
        slo_tpot_s=1.0,
        seed=0,
    )
    with pytest.raises(ConfigError, match="streams, rate"):
        bench_serve("127.0.0.1:1", options, None)
