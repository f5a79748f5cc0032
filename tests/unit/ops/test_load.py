"""Load generation and what is made of its outcomes."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pathlib
import random
import time
from typing import Any

import pytest

from octet.client import AsyncClient
from octet.errors import ConfigError, UnavailableError
from ops.bench.load import Arrival, ask, closed_loop, open_loop, poisson, read_trace
from ops.bench.serve import LoadOptions, bench_serve
from tests.unit.ops.played import Answering, playing


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
    (first,) = read_trace(file, num_requests=1, time_scale=1.0, length_scale=100.0, max_len=500)
    assert (first.prompt_tokens, first.new_tokens) == (250, 250)


ARRIVALS = [Arrival(at_s=random.random() / 50, prompt_tokens=random.randint(1, 9), new_tokens=2) for _ in range(12)]


async def test_latencies_count_from_when_a_request_was_due() -> None:
    late_s = random.uniform(5.0, 10.0)
    async with playing(Answering()) as address, AsyncClient(address, timeout_s=20.0) as client:
        start_s = time.perf_counter() - late_s
        due = await ask(client, ARRIVALS[0], [1, 2], start_s, due_s=0.0)
        now = await ask(client, ARRIVALS[0], [1, 2], start_s)
    assert due.due_s == 0.0
    assert late_s <= due.lag_s <= due.ttft_s <= due.end_s < late_s + 5.0
    assert now.due_s >= late_s
    assert now.lag_s == 0.0
    assert now.ttft_s <= now.end_s < 5.0


async def test_an_open_loop_plans_its_times_and_a_closed_one_takes_turns() -> None:
    async with playing(Answering()) as address, AsyncClient(address, timeout_s=20.0) as client:
        planned, planned_s = await open_loop(client, ARRIVALS, 100, random.Random())
        in_turn, _ = await closed_loop(client, ARRIVALS, 3, 100, random.Random())
    assert [outcome.due_s for outcome in planned] == [arrival.at_s for arrival in ARRIVALS]
    assert all(0.0 <= outcome.lag_s <= outcome.ttft_s for outcome in planned)
    assert max(outcome.due_s + outcome.end_s for outcome in planned) <= planned_s
    assert [outcome.prompt_tokens for outcome in planned] == [arrival.prompt_tokens for arrival in ARRIVALS]
    assert sorted(outcome.prompt_tokens for outcome in in_turn) == sorted(a.prompt_tokens for a in ARRIVALS)
    assert {outcome.lag_s for outcome in in_turn} == {0.0}


async def test_an_error_is_on_record_with_what_it_says() -> None:
    async with playing(Answering(error="no such thing")) as address, AsyncClient(address, timeout_s=20.0) as client:
        outcome = await ask(client, ARRIVALS[0], [1], time.perf_counter())
    assert (outcome.error, outcome.problem) == ("INTERNAL", "INTERNAL: no such thing")
    assert outcome.token_times_s == ()


@pytest.mark.parametrize("load", [{"streams": 2}, {"rate": 500.0}])
async def test_prompts_follow_the_seed(load: dict[str, Any]) -> None:
    first, second = random.sample(range(1000), 2)
    prompts = []
    for seed in (first, first, second):
        answering = Answering()
        async with playing(answering) as address:
            options = _options(requests=8, prompt_tokens=6, seed=seed, **load)
            await asyncio.to_thread(bench_serve, address, options, None)
        prompts.append(sorted(answering.prompts))
    assert prompts[0] == prompts[1] != prompts[2]
    assert len(set(prompts[0])) == 8


async def test_a_load_that_only_failed_is_no_success(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "load.json"
    async with playing(Answering(error="out of order")) as address:
        with pytest.raises(UnavailableError, match=r"5 × INTERNAL.*out of order"):
            await asyncio.to_thread(bench_serve, address, _options(streams=2, requests=5, seed=7), file)
    report = json.loads(file.read_text())
    assert (report["seed"], report["errors"], report["ttft_s"], report["e2e_s"]) == (7, {"INTERNAL": 5}, None, None)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["TTFT", "-", "-", "-"] in rows


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
