"""`octet bench peers`: contestants take turns, round by round, on the same prompts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from model.config import read_config
from octet.errors import ConfigError
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.machine import Machine, describe
from ops.bench.peers.contestants import PEERS, ClusterContestant, Contestant, Size, WholeAnswers
from ops.bench.peers.environments import PeerError
from ops.bench.peers.rates import Trial, Trials, goal_of, rate_of, ratios
from ops.bench.spread import Spread, spread

SCHEMA = "octet.peers/2"
_REST_S = 2.0
"""Between two contestants: threads spin for a while after their work, vLLM's worker for a second of a whole core."""
_LEAST_PROMPTS = 8
"""Of a round: a run of a few prompts takes some hundredths of a second, and is repeated with others until there are so
many. Its time is the median."""
OURS = (ClusterContestant.name, WholeAnswers.name)
_KINDS = ("decode", "prefill", "whole")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PeersOptions:
    peers: tuple[str, ...] = tuple(PEERS)
    streams: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    new_tokens: int = 32
    rounds: int = 5
    threads: int | None = None
    """Of one-process contestants; None takes the machine's cores."""
    overrides: tuple[str, ...] = ()
    """Of the cluster's config."""
    address: str | None = None
    """Of a cluster that runs with the same checkpoint, to be asked in place of one of its own."""
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Some of `temperature`, `top_p`, `top_k`, of all contestants; none for greedy."""
    env_dir: pathlib.Path


def bench_peers(model_dir: pathlib.Path | None, options: PeersOptions, json_file: pathlib.Path | None) -> None:
    """Print rates, and ratios beside their goals; with `json_file`, write every trial there.

    A peer that cannot be built or does not start is left out, and a line says so. Raises: ConfigError, OctetError.
    """
    unknown = [peer for peer in options.peers if peer not in PEERS]
    if unknown:
        raise ConfigError("bench peers --peers", ", ".join(unknown), f"names of {', '.join(PEERS)}")
    if repeated := [peer for peer, count in Counter(options.peers).items() if count > 1]:
        raise ConfigError("bench peers --peers", f"{', '.join(repeated)} more than once", "each peer once")
    if options.sampling and "temperature" not in options.sampling:
        raise ConfigError("bench peers", ", ".join(options.sampling), "a temperature beside it")
    if options.address is not None and options.overrides:
        raise ConfigError("bench peers --set", " ".join(options.overrides), "none for a cluster that runs already")
    machine, console = describe(), Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as closing:
        if model_dir is None:
            model_dir = pathlib.Path(scratch)
            write_checkpoint(model_dir, BENCH)
        size = Size(
            checkpoint=model_dir.resolve(),
            threads=options.threads or len(os.sched_getaffinity(0)),
            max_sequences=max(options.streams),
            max_len=options.prompt_tokens + options.new_tokens + 1,
            sampling=options.sampling,
        )
        contestants = _start(options, size, closing, console)
        vocab_size = read_config(model_dir).vocab_size
        with console.status("") as status:
            trials = run_rounds(contestants, options, vocab_size, status.update)
    versions = {contestant.name: contestant.version for contestant in contestants}
    print_trials(machine, versions, trials, options, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(machine, versions, trials, options), indent=2) + "\n")


def _start(options: PeersOptions, size: Size, closing: contextlib.ExitStack, console: Console) -> list[Contestant]:
    """Environments are built, and peers loaded, before the cluster starts: both take the machine."""
    contestants = []
    for name in options.peers:
        try:
            contestant = PEERS[name](size, options.env_dir)
        except PeerError as error:
            console.print(Text.assemble(("left out:", "yellow"), f" {error}"))
            continue
        closing.callback(contestant.close)
        contestants.append(contestant)
    cluster = ClusterContestant(size, options.overrides, options.address)
    closing.callback(cluster.close)
    return [cluster, WholeAnswers(cluster), *contestants]


def run_rounds(
    contestants: Sequence[Contestant],
    options: PeersOptions,
    vocab_size: int,
    report: Callable[[str], None] = lambda line: None,
) -> Trials:
    """The first round warms up and does not count. Each round begins with another contestant.

    Raises: OctetError.
    """
    trials: dict[tuple[str, int], list[Trial]] = defaultdict(list)
    for number in range(options.rounds + 1):
        for streams in options.streams:
            repeats = -(-_LEAST_PROMPTS // streams)
            first, second = (
                [_prompts(streams, options.prompt_tokens, vocab_size) for _ in range(repeats)] for _ in range(2)
            )
            turn = number % len(contestants)
            for contestant in (*contestants[turn:], *contestants[:turn]):
                report(f"round {number} of {options.rounds}: {contestant.name}, {streams} streams")
                time.sleep(_REST_S)
                trial = Trial(
                    streams=streams,
                    prompt_tokens=options.prompt_tokens,
                    new_tokens=options.new_tokens,
                    first_s=statistics.median(contestant.run(prompts, 1) for prompts in first),
                    all_s=statistics.median(contestant.run(prompts, options.new_tokens + 1) for prompts in second),
                )
                if number:
                    trials[contestant.name, streams].append(trial)
    return trials


def _prompts(count: int, num_tokens: int, vocab_size: int) -> list[list[int]]:
    return [random.choices(range(vocab_size), k=num_tokens) for _ in range(count)]


def print_trials(
    machine: Machine, versions: dict[str, str], trials: Trials, options: PeersOptions, console: Console
) -> None:
    console.print(machine.line)
    for name, version in versions.items():
        console.print(Text(f"{name}: {version}", style="dim"))
    console.print(
        f"prompts of {options.prompt_tokens} random tokens, {options.new_tokens} more after the first, "
        f"{', '.join(f'{name} {value:g}' for name, value in options.sampling.items()) or 'greedy'}; "
        f"tokens per second, medians of {options.rounds} rounds (lowest to highest)"
    )
    rates = Table(box=None, pad_edge=False)
    for column in ("system", "streams", *_KINDS):
        rates.add_column(column, justify="left" if column == "system" else "right")
    for name in versions:
        for streams in options.streams:
            of_kind = [spread([rate_of(trial, kind) for trial in trials[name, streams]]) for kind in _KINDS]
            rates.add_row(name, str(streams), *(_with_range(one, 0) for one in of_kind))
    console.print(rates)
    for ours in OURS:
        compared = Table(box=None, pad_edge=False)
        for column in (f"{ours} ÷", "streams", *_KINDS):
            compared.add_column(column, justify="left" if column.endswith("÷") else "right")
        for name in versions:
            if name not in OURS:
                for streams in options.streams:
                    cells = (_ratio(trials, ours, name, streams, kind) for kind in _KINDS)
                    compared.add_row(name, str(streams), *cells)
        console.print(compared)


def _ratio(trials: Trials, ours: str, peer: str, streams: int, kind: str) -> str:
    ratio = ratios(trials[ours, streams], trials[peer, streams], kind)
    goal = goal_of(kind, streams, peer)
    if goal is None:
        return _with_range(ratio, 2)
    met = ratio.median >= goal.ratio
    return f"[{'green' if met else 'red'}]{_with_range(ratio, 2)} {'≥' if met else '<'} {goal.ratio:g}[/]"


def _with_range(values: Spread, digits: int) -> str:
    return f"{values.median:.{digits}f} ({values.lowest:.{digits}f}–{values.highest:.{digits}f})"


def as_json(machine: Machine, versions: dict[str, str], trials: Trials, options: PeersOptions) -> dict[str, Any]:
    """Every trial, in seconds, the medians, and of peers what ours are of them."""
    results = [
        {
            "contestant": name,
            "streams": streams,
            "trials": [{"first_s": trial.first_s, "all_s": trial.all_s} for trial in of_pair],
            **{
                f"{kind}_rate": dataclasses.asdict(spread([rate_of(trial, kind) for trial in of_pair]))
                for kind in _KINDS
            },
            "ratios": {
                ours: {kind: dataclasses.asdict(ratios(trials[ours, streams], of_pair, kind)) for kind in _KINDS}
                for ours in OURS
                if name not in OURS
            },
        }
        for (name, streams), of_pair in trials.items()
    ]
    return {
        "schema": SCHEMA,
        "machine": dataclasses.asdict(machine),
        "versions": versions,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "sampling": dict(options.sampling),
        "results": results,
    }
