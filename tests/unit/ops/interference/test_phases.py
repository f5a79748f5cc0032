"""What a phase does, on streams that need no model, and how variants are named."""

from __future__ import annotations

import asyncio
import io
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from rich.console import Console

from octet.client import CallError
from octet.errors import ConfigError
from ops.bench.interference.command import (
    InterferenceOptions,
    as_json,
    bench_interference,
    clusters_to_start,
    parse_variant,
    print_comparisons,
    run_rounds,
)
from ops.bench.interference.gaps import compare
from ops.bench.machine import Machine
from ops.bench.peers.engines import run_phase

MACHINE = Machine(cpu="cpu", cores=2, memory_gib=24, gpu="", python="3.11", torch="2.13", date="2026-11-25", load=0.0)


async def ticking(prompt: list[int], new_tokens: int) -> AsyncIterator[object]:
    for token in range(new_tokens):
        await asyncio.sleep(0.002)
        yield token


def options(tmp_path: pathlib.Path, **fields: Any) -> InterferenceOptions:
    return InterferenceOptions(
        streams=3, new_tokens=30, long_prompts=2, long_tokens=9, every_s=0.005, threads=1, env_dir=tmp_path, **fields
    )


async def test_long_prompts_come_when_every_stream_has_a_token() -> None:
    log: list[int] = []

    async def logged(prompt: list[int], new_tokens: int) -> AsyncIterator[object]:
        log.append(len(prompt))
        async for token in ticking(prompt, new_tokens):
            yield token

    request = {"prompts": [[1], [2]], "new_tokens": 10, "long_prompts": [[3] * 9, [4] * 9], "every_s": 0.003}
    answer = await run_phase(logged, request)
    assert log == [1, 1, 9, 9]
    assert [len(times) for times in answer["streams"]] == [10, 10]
    first_tokens = max(times[0] for times in answer["streams"])
    assert all(first_tokens <= sent_s < first_s for sent_s, first_s in answer["long"])


@pytest.mark.parametrize("length", [1, 9])
async def test_a_stream_that_fails_says_why(length: int) -> None:
    """Be it one that runs or a long prompt."""

    async def failing(prompt: list[int], new_tokens: int) -> AsyncIterator[object]:
        if len(prompt) == length:
            raise CallError(grpc.StatusCode.INVALID_ARGUMENT, "too long")
        async for token in ticking(prompt, new_tokens):
            yield token

    request = {"prompts": [[1], [2]], "new_tokens": 10, "long_prompts": [[3] * 9], "every_s": 0.001}
    with pytest.raises(CallError, match="INVALID_ARGUMENT: too long"):
        await run_phase(failing, request)


def test_contestants_take_turns_over_quiet_and_disturbed_phases(tmp_path: pathlib.Path) -> None:
    log: list[tuple[str, int]] = []

    def runner(name: str) -> Any:
        def run(request: dict[str, Any]) -> dict[str, Any]:
            log.append((name, len(request["long_prompts"])))
            return asyncio.run(run_phase(ticking, request))

        return run

    wanted = options(tmp_path, rounds=2)
    rounds = run_rounds({"a": runner("a"), "b": runner("b")}, wanted, vocab_size=100)
    a, b = [("a", 0), ("a", 2)], [("b", 0), ("b", 2)]
    assert log == [*a, *b, *b, *a, *a, *b]
    assert {name: len(pairs) for name, pairs in rounds.items()} == {"a": 2, "b": 2}
    results = {name: compare(pairs) for name, pairs in rounds.items()}
    out = io.StringIO()
    print_comparisons(
        MACHINE, results | {"[/b]": results["b"]}, wanted, Console(file=out, width=160, color_system=None)
    )
    assert "[/b]" in out.getvalue()
    assert "goal: p99 ÷ quiet at most 1.5" in out.getvalue()
    report = as_json(MACHINE, results, wanted)
    assert report["results"]["a"]["p99_ratio"] == results["a"].p99_ratio


def test_a_variant_is_a_name_and_fields() -> None:
    assert parse_variant("octet") == ("octet", ())
    assert parse_variant("small:prefill.chunk_tokens=64,lane.ping_pong_rows=null") == (
        "small",
        ("prefill.chunk_tokens=64", "lane.ping_pong_rows=null"),
    )


def test_clusters_are_started_unless_one_runs(tmp_path: pathlib.Path) -> None:
    assert clusters_to_start(options(tmp_path)) == {"octet": ()}
    assert clusters_to_start(options(tmp_path, variants=("a", "b:x.y=1"))) == {"a": (), "b": ("x.y=1",)}
    assert clusters_to_start(options(tmp_path, address="127.0.0.1:1")) == {}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"variants": ("a:x=1",), "address": "127.0.0.1:1"}, "--variant.*a:x=1.*--grpc"),
        ({"variants": ("a", "b", "a:x=1")}, "--variant.*'a' twice"),
        ({"variants": ("vllm:x=1",), "vllm": True}, "--variant.*'vllm' twice"),
    ],
)
def test_variants_that_would_be_lost_are_refused(tmp_path: pathlib.Path, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        bench_interference(None, options(tmp_path, **fields), None)


@pytest.mark.parametrize("text", ["", ":a=1", "name:a", "name:a=1,"])
def test_a_variant_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--variant"):
        parse_variant(text)
