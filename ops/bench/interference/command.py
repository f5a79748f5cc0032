"""`octet bench interference`: quiet and disturbed phases in turn, on clusters of its own, and on vLLM if asked for."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import random
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from model.config import read_config
from octet.client import AsyncClient
from octet.errors import ConfigError
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.interference.gaps import Comparison, Phase, compare
from ops.bench.machine import Machine, describe
from ops.bench.peers.contestants import Size, launch_cluster, start_engine
from ops.bench.peers.engines import run_phase
from ops.bench.peers.environments import VLLM, PeerError

SCHEMA = "octet.interference/1"
GOAL = 1.5
_TIMEOUT_S = 600.0
_LONG_NEW_TOKENS = 2
_OCTET, _VLLM = "octet", "vllm"

RunPhase = Callable[[dict[str, Any]], dict[str, Any]]
"""See `ops.bench.peers.engines.run_phase`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InterferenceOptions:
    variants: tuple[str, ...] = ()
    """`name` or `name:field=value,field=value`: clusters to compare; none for one as it is by default."""
    address: str | None = None
    """Of a cluster that runs with the same checkpoint, to be asked in place of clusters of its own."""
    vllm: bool = False
    streams: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 200
    long_prompts: int = 3
    long_tokens: int = 2000
    every_s: float = 1.5
    rounds: int = 5
    threads: int
    env_dir: pathlib.Path


def bench_interference(
    model_dir: pathlib.Path | None, options: InterferenceOptions, json_file: pathlib.Path | None
) -> None:
    """Print both phases' inter-token latencies and their ratio; with `json_file`, write them there.

    Raises: ConfigError, OctetError.
    """
    variants = clusters_to_start(options)
    machine, console = describe(), Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as closing:
        if model_dir is None:
            model_dir = pathlib.Path(scratch)
            write_checkpoint(model_dir, BENCH)
        size = Size(
            checkpoint=model_dir.resolve(),
            threads=options.threads,
            max_sequences=options.streams + options.long_prompts,
            max_len=max(options.prompt_tokens + options.new_tokens, options.long_tokens + _LONG_NEW_TOKENS),
        )
        contestants = _start(options, variants, size, closing, console)
        with console.status("") as status:
            rounds = run_rounds(contestants, options, read_config(model_dir).vocab_size, status.update)
    results = {name: compare(of_one) for name, of_one in rounds.items()}
    print_comparisons(machine, results, options, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(machine, results, options), indent=2) + "\n")


def clusters_to_start(options: InterferenceOptions) -> dict[str, tuple[str, ...]]:
    """By name, the config fields that each changes. Raises: ConfigError."""
    if options.address is not None:
        if options.variants:
            found = " ".join(options.variants)
            raise ConfigError("bench interference --variant", found, "none beside --grpc: that cluster runs already")
        return {}
    parsed = [parse_variant(text) for text in options.variants or (_OCTET,)]
    taken = {_VLLM} if options.vllm else set()
    for name, _ in parsed:
        if name in taken:
            raise ConfigError("bench interference --variant", f"{name!r} twice", "a name of its own for each")
        taken.add(name)
    return dict(parsed)


def parse_variant(text: str) -> tuple[str, tuple[str, ...]]:
    """Its name and the config fields that it changes. Raises: ConfigError."""
    name, _, fields = text.partition(":")
    overrides = tuple(fields.split(",")) if fields else ()
    if not name or any("=" not in override for override in overrides):
        raise ConfigError("bench interference --variant", repr(text), "name or name:field=value,field=value")
    return name, overrides


def _start(
    options: InterferenceOptions,
    variants: Mapping[str, tuple[str, ...]],
    size: Size,
    closing: contextlib.ExitStack,
    console: Console,
) -> dict[str, RunPhase]:
    contestants: dict[str, RunPhase] = {}
    if options.vllm:
        try:
            peer = start_engine("vllm-streams", VLLM, size, options.env_dir)
        except PeerError as error:
            console.print("[yellow]left out:[/]", escape(str(error)))
        else:
            closing.callback(peer.close)
            contestants[_VLLM] = lambda request: peer.ask(**request)
    if options.address is not None:
        contestants[_OCTET] = _asker(options.address)
    for name, overrides in variants.items():
        cluster = launch_cluster(size, overrides)
        closing.callback(cluster.stop, drain=False)
        contestants[name] = _asker(cluster.address)
    return contestants


def _asker(address: str) -> RunPhase:
    async def run(request: dict[str, Any]) -> dict[str, Any]:
        async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client:
            await client.model_info()

            def stream(prompt: list[int], new_tokens: int) -> AsyncIterator[object]:
                return client.stream(prompt, max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0)

            return await run_phase(stream, request)

    return lambda request: asyncio.run(run(request))


def run_rounds(
    contestants: Mapping[str, RunPhase],
    options: InterferenceOptions,
    vocab_size: int,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, list[tuple[Phase, Phase]]]:
    """Quiet, then disturbed, for each contestant in turn. A first round, which warms up, does not count."""
    rounds: dict[str, list[tuple[Phase, Phase]]] = defaultdict(list)
    names = list(contestants)
    for number in range(options.rounds + 1):
        turn = number % len(names)
        for name in (*names[turn:], *names[:turn]):
            report(f"round {number} of {options.rounds}: {name}")
            pair = tuple(
                _phase(contestants[name](_request(options, vocab_size, num_long)))
                for num_long in (0, options.long_prompts)
            )
            if number:
                rounds[name].append((pair[0], pair[1]))
    return rounds


def _request(options: InterferenceOptions, vocab_size: int, num_long: int) -> dict[str, Any]:
    """New random prompts, so that no prefix cache knows them."""
    return {
        "prompts": [random.choices(range(vocab_size), k=options.prompt_tokens) for _ in range(options.streams)],
        "new_tokens": options.new_tokens,
        "long_prompts": [random.choices(range(vocab_size), k=options.long_tokens) for _ in range(num_long)],
        "every_s": options.every_s,
    }


def _phase(answer: Mapping[str, Any]) -> Phase:
    return Phase(streams=answer["streams"], long=[(sent_s, first_s) for sent_s, first_s in answer["long"]])


def print_comparisons(
    machine: Machine, results: Mapping[str, Comparison], options: InterferenceOptions, console: Console
) -> None:
    console.print(machine.line)
    console.print(
        f"{options.streams} streams of {options.new_tokens} tokens, quiet and while {options.long_prompts} prompts of "
        f"{options.long_tokens} tokens arrive {options.every_s:g} s apart; inter-token latency in ms, "
        f"{options.rounds} rounds"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "quiet p50", "p99", "disturbed p50", "p99", "longest", "p99 ÷ quiet", "rounds", "long TTFT s"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        ratios = sorted(result.p99_ratios)
        table.add_row(
            Text(name),
            *_ms(result.quiet.p50_s, result.quiet.p99_s),
            *_ms(result.disturbed.p50_s, result.disturbed.p99_s, result.disturbed.longest_s),
            f"{result.p99_ratio:.2f}",
            f"{ratios[0]:.2f}–{ratios[-1]:.2f}",
            f"{result.long_ttft_s:.1f}",
        )
    console.print(table)
    console.print(f"goal: p99 ÷ quiet at most {GOAL:g}")


def _ms(*seconds: float) -> Sequence[str]:
    return [f"{value * 1e3:.0f}" for value in seconds]


def as_json(machine: Machine, results: Mapping[str, Comparison], options: InterferenceOptions) -> dict[str, Any]:
    load = {field: value for field, value in dataclasses.asdict(options).items() if field != "env_dir"}
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(machine),
        "load": load,
        "results": {
            name: dataclasses.asdict(result) | {"p99_ratio": result.p99_ratio} for name, result in results.items()
        },
    }
