"""`octet bench telemetry`: what counting costs, as a share of the step that is counted.

Two measurements. What is added to every frame, layer and step is timed by itself, with the code that serves, and put
beside a decode step of the one-process engine on the same machine. And a cluster's decode step is taken with members
being read once a second, as by default, ten times as often, and once a minute, in alternation; as steps wander by more
than a reading takes, so is the processor time that the same clusters use when nothing else is asked of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import pathlib
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cluster.launch import launch
from experts.meter import FrameMeter
from octet.client import AsyncClient, Client
from octet.config import TelemetryConfig, load_config
from octet.counters import FrameCounters
from octet.ids import WorkerId
from octet.v1 import octet_pb2 as pb
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.machine import describe
from ops.bench.processor_time import threads_s
from ops.bench.soak import family_memory
from ops.local import DECODE, LocalEngine, make_request
from router.telemetry import Telemetry
from router.telemetry_samples import ShardSample

_STREAMS, _PROMPT_TOKENS, _NEW_TOKENS, _SHARDS = 8, 16, 128, 2
_WARM_UP, _STEPS = 4, 40
_LOOPS, _REPEATS = 20_000, 5
_LAYERS, _EXPERTS, _LARGE_SHARDS = 89, 160, 16
_READINGS_S = {"ten a second": 0.1, "one a second, the default": 1.0, "one a minute": 60.0}
_WINDOWS, _IDLE_S = 3, 5.0
_DEADLINE_S = 120.0


def bench_telemetry(rounds: int) -> None:
    """Print both. Raises: CallError."""
    torch.set_num_threads(1)
    console = Console(highlight=False)
    console.print(describe().line)
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = pathlib.Path(scratch)
        write_checkpoint(model_dir, BENCH)
        step_s, num_layers = _local_step(model_dir)
        console.print(_counting(step_s, num_layers))
        if rounds:
            console.print(_reading(model_dir, rounds))


def _counting(step_s: float, num_layers: int) -> Table:
    """Medians of what is added, by the number of times that a step does it."""
    table = Table(box=None, pad_edge=False, title="counting", title_justify="left")
    for column in ("what", "µs", "times a step", "µs a step", "of the step"):
        table.add_column(column, justify="left" if column == "what" else "right")
    parts = [
        ("a frame: three clock readings, two meters", _median_s(_frame()), num_layers * _SHARDS),
        ("a frame: its experts, counted", _median_s(_experts()), num_layers * _SHARDS),
        ("a layer: the wait for the sums", _median_s(_wait()), num_layers),
        ("a step: its duration", _median_s(_wait()), 1),
    ]
    for what, cost_s, times in parts:
        share = cost_s * times / step_s
        table.add_row(what, f"{cost_s * 1e6:.2f}", str(times), f"{cost_s * times * 1e6:.1f}", f"{share:.3%}")
    total_s = sum(cost_s * times for _, cost_s, times in parts)
    table.add_row(f"all, of a step of {step_s * 1e3:.1f} ms", "", "", f"{total_s * 1e6:.1f}", f"{total_s / step_s:.3%}")
    record_s, window_s = _aggregation()
    table.add_row(
        f"the router service: a reading of {_LARGE_SHARDS} shards × {_LAYERS} × {_EXPERTS}", f"{record_s * 1e6:.0f}"
    )
    table.add_row("the router service: a window of 60 such readings", f"{window_s * 1e6:.0f}")
    return table


def _frame() -> Callable[[], object]:
    """As `ShardLoop` does it."""
    total, of_lane, rows = FrameMeter(), FrameMeter(), range(8)

    def note() -> None:
        received_s = time.perf_counter()
        begun_s = time.perf_counter()
        noted = (len(rows), begun_s - received_s, time.perf_counter() - begun_s)
        total.note(*noted)
        of_lane.note(*noted)

    return note


def _experts() -> Callable[[], object]:
    """As `ExpertShard` does it for frames of several calls, beside counting, which it always did. Where a frame is one
    call, as in decode steps, that call does it, for less."""
    counts_S, total_S, activated = np.ones(16, dtype=np.int64), np.zeros(16, dtype=np.int64), [0]

    def note() -> None:
        np.zeros(16, dtype=np.int64)
        np.add(total_S, counts_S, out=total_S)
        activated[0] += int(np.count_nonzero(counts_S))

    return note


def _wait() -> Callable[[], object]:
    """As `RoutedExperts.combine` does it."""
    waited_s = [0.0]

    def note() -> None:
        begun_s = time.perf_counter()
        waited_s[0] += time.perf_counter() - begun_s

    return note


def _aggregation() -> tuple[float, float]:
    """Seconds of one reading, and of one window, of a large model."""
    config = TelemetryConfig()
    telemetry = Telemetry(range(_LAYERS), _EXPERTS, 8, config, now_s=0.0)
    rng = np.random.default_rng()
    record_s, window_s = [], []
    for second in range(1, 91):
        samples = [
            ShardSample(
                worker_id=WorkerId(f"experts-{shard}"),
                incarnation=1,
                uptime_s=float(second),
                tokens_LE=second * 1000 + rng.integers(0, 1000, (_LAYERS, _EXPERTS)),
                activated=second,
                frames=FrameCounters(frames=second),
                lanes={f"decode-{lane}": FrameCounters(frames=second) for lane in range(4)},
                waiting=0,
            )
            for shard in range(_LARGE_SHARDS)
        ]
        begun_s = time.perf_counter()
        telemetry.record(float(second), samples)
        recorded_s = time.perf_counter()
        telemetry.window(float(second))
        record_s.append(recorded_s - begun_s)
        window_s.append(time.perf_counter() - recorded_s)
    return statistics.median(record_s[60:]), statistics.median(window_s[60:])


def _median_s(run: Callable[[], object]) -> float:
    """Of one call: the median of several means."""
    means = []
    for _ in range(_REPEATS):
        begun_s = time.perf_counter()
        for _ in range(_LOOPS):
            run()
        means.append((time.perf_counter() - begun_s) / _LOOPS)
    return statistics.median(means)


def _local_step(model_dir: pathlib.Path) -> tuple[float, int]:
    """The median decode step of the one-process engine, and the number of layers with experts."""
    with contextlib.closing(LocalEngine(model_dir, num_shards=_SHARDS)) as engine:
        for _ in range(_STREAMS):
            prompt = random.choices(range(engine.config.vocab_size), k=_PROMPT_TOKENS)
            engine.submit(make_request(prompt, max_new_tokens=_NEW_TOKENS))
        deadline_s = time.monotonic() + _DEADLINE_S
        while engine.load()[DECODE].running < _STREAMS:
            assert time.monotonic() < deadline_s, "the prompts are computed in time"
            engine.step()
        times = []
        for _ in range(_WARM_UP + _STEPS):
            begun_s = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - begun_s)
        return statistics.median(times[_WARM_UP:]), len(engine.config.moe_layers)


def _reading(model_dir: pathlib.Path, rounds: int) -> Table:
    """A cluster's decode step by how often its members are read; clusters take turns, each with a Ray of its own."""
    costs: dict[str, list[_Cost]] = {often: [] for often in _READINGS_S}
    for number in range(rounds):
        # The order changes, as the machine's mood may.
        for often in list(_READINGS_S)[:: 1 if number % 2 else -1]:
            costs[often].append(_cluster_cost(model_dir, _READINGS_S[often]))
    most, *_, least = costs
    table = Table(box=None, pad_edge=False, title="\nreading members", title_justify="left")
    for column in ("readings", "decode step ms", "÷ the last in its round", "decode worker, idle, ms/s", "all, idle"):
        table.add_column(column, justify="left" if column == "readings" else "right")
    for often, found in costs.items():
        table.add_row(
            often,
            _spread([cost.step_s * 1e3 for cost in found], ".1f"),
            _spread([cost.step_s / last.step_s for cost, last in zip(found, costs[least], strict=True)], ".3f"),
            _spread([cost.worker_share * 1e3 for cost in found], ".1f"),
            _spread([cost.total_share * 1e3 for cost in found], ".1f"),
        )
    more_ms = (1 / _READINGS_S[most] - 1 / _READINGS_S[least]) / 1e3
    pairs = list(zip(costs[most], costs[least], strict=True))
    of_worker = _spread([(often.worker_share - seldom.worker_share) / more_ms for often, seldom in pairs])
    of_all = _spread([(often.total_share - seldom.total_share) / more_ms for often, seldom in pairs])
    table.add_row("processor ms a reading", "", "", of_worker, of_all)
    return table


def _spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, and from the lowest to the highest."""
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


class _Cost(NamedTuple):
    step_s: float
    """That the decode worker's thread spends in a step of all streams: the median of several windows."""
    worker_share: float
    """Of a core, that the decode worker takes when nothing is asked for."""
    total_share: float
    """That all processes take then, Ray's own included."""


def _cluster_cost(model_dir: pathlib.Path, reading_s: float) -> _Cost:
    fields = {
        "model.path": str(model_dir),
        "pools.experts.size": _SHARDS,
        "telemetry.step_s": reading_s,
        "telemetry.silent_s": 1000,
        "ray.namespace": f"octet-{uuid.uuid4().hex[:8]}",
        "frontend.port": 0,
    }
    cluster = launch(load_config(values=fields))
    try:
        asyncio.run(_ask(cluster.address, _NEW_TOKENS // 4))
        seen = [_decode_worker(cluster.address)]
        for _ in range(_WINDOWS):
            asyncio.run(_ask(cluster.address, _NEW_TOKENS))
            seen.append(_decode_worker(cluster.address))
        worker, everyone = [seen[0].pid], [pid for pid, _ in family_memory() if pid != os.getpid()]
        before_s = [threads_s(worker), threads_s(everyone)]
        time.sleep(_IDLE_S)
        after_s = [threads_s(worker), threads_s(everyone)]
    finally:
        cluster.stop(drain=False)
    steps_s = [
        (after.load.total_busy_s - before.load.total_busy_s) / ((after.tokens - before.tokens) / _STREAMS)
        for before, after in itertools.pairwise(seen)
    ]
    shares = [(after - before) / _IDLE_S for before, after in zip(before_s, after_s, strict=True)]
    return _Cost(statistics.median(steps_s), *shares)


async def _ask(address: str, new_tokens: int) -> None:
    async with AsyncClient(address, timeout_s=_DEADLINE_S) as client:
        vocab_size = (await client.model_info()).vocab_size
        prompts = [random.choices(range(vocab_size), k=_PROMPT_TOKENS) for _ in range(_STREAMS)]
        await asyncio.gather(
            *(client.generate(p, max_new_tokens=new_tokens, ignore_eos=True, temperature=0.0) for p in prompts)
        )


def _decode_worker(address: str) -> pb.Member:
    with Client(address, timeout_s=30.0) as client:
        status = client.status()
    member: pb.Member = next(pool.members[0] for pool in status.pools if pool.name == "decode")
    return member
