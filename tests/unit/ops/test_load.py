"""Load generation and what is made of its outcomes."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from typing import Any

import pytest

from octet.errors import ConfigError
from ops.bench.load import poisson, read_trace
from ops.bench.serve import LoadOptions, bench_serve


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


@pytest.mark.parametrize(
    ("trace", "told"),
    [
        (None, r"--trace.*trace\.jsonl.*a readable file"),
        ("no JSON", r"--trace.*trace\.jsonl:1:"),
        ('{"timestamp": 0, "input_length": 3, "output_length": 4}\n{"timestamp": 5}', r"--trace.*trace\.jsonl:2:"),
    ],
)
def test_a_trace_that_is_none_is_refused_with_its_file_and_line(
    tmp_path: pathlib.Path, trace: str | None, told: str
) -> None:
    file = tmp_path / "trace.jsonl"
    if trace is not None:
        file.write_text(trace)
    with pytest.raises(ConfigError, match=told):
        read_trace(file, num_requests=2, time_scale=1.0, length_scale=1.0, max_len=500)


def _options(**given: Any) -> LoadOptions:
    rest = {"streams": None, "rate": None, "trace": None, "requests": 1, "prompt_tokens": 1, "new_tokens": 1}
    scales = {"time_scale": 1.0, "length_scale": 1.0, "slo_ttft_s": 1.0, "slo_tpot_s": 1.0, "seed": 0}
    return LoadOptions(**(rest | scales | given))


@pytest.mark.parametrize(("given", "found"), [({}, "no load"), ({"streams": 1, "rate": 1.0}, "streams, rate")])
def test_anything_but_one_kind_of_load_is_refused(given: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        bench_serve("127.0.0.1:1", _options(**given), None)


def test_a_plot_without_matplotlib_is_refused_before_the_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"octet\[bench\]"):
        bench_serve("127.0.0.1:1", _options(streams=1), None, tmp_path / "load.png")
