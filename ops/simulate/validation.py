"""`octet bench simulator`: one closed loop on real clusters of this machine and on simulated ones, at three sizes.

What members cost is what `octet bench breakdown` has measured, of plain processes. What all other processes take of the
shared cores (frontend, Ray, the bench as a client) is measured here, as processor time, on the first size and with half
the streams.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import statistics
import tempfile
import uuid
from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from cluster.launch import launch
from octet.client import AsyncClient
from octet.config import OctetConfig, load_config
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.load import Arrival, closed_loop
from ops.bench.summary import summarize
from ops.simulate.costs import CPU, Costs, calibrated, from_rates
from ops.simulate.expert_loads import drawn
from ops.simulate.load import Request
from ops.simulate.outcome import summarized
from ops.simulate.shape import shape_of
from ops.simulate.simulation import Options, Simulation

_SIZES = ((1, 1, 1), (1, 1, 2), (1, 2, 3))
"""Prefill workers, decode workers, shards."""
_ALPHA = (0.0, 0.1)
"""A random checkpoint on random prompts routes almost evenly."""
_TICK_S = 0.02
_TIMEOUT_S = 600.0
_IDLE_S = 4.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ValidationOptions:
    streams: int = 8
    requests: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    tokens_per_s: float
    tpot_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Others:
    """What processes that are no members take of the cores; see `Costs`."""

    cores: float
    per_token_s: float


def bench_simulator(calibration: pathlib.Path, options: ValidationOptions, cores: int) -> None:
    """Print measured and simulated throughput and TPOT (p50), and their quotients. Raises: OctetError."""
    table = Table(box=None, pad_edge=False)
    for column in ("pools", "tokens/s", "simulated", "÷ measured", "TPOT ms", "simulated", "÷ measured"):
        table.add_column(column, justify="left" if column == "pools" else "right")
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(pathlib.Path(scratch), BENCH)
        costs = _costs(scratch, calibration, cores)
        others = asyncio.run(_others(_config(scratch, _SIZES[0], costs.worker_threads), options))
        costs = dataclasses.replace(costs, others_cores=others.cores, others_per_token_s=others.per_token_s)
        for sizes in _SIZES:
            config = _config(scratch, sizes, costs.worker_threads)
            measured = asyncio.run(_measured(config, options))
            simulated = _simulated(config, sizes, scratch, costs, options)
            table.add_row(
                " + ".join(map(str, sizes)),
                f"{measured.tokens_per_s:.1f}",
                f"{simulated.tokens_per_s:.1f}",
                f"{simulated.tokens_per_s / measured.tokens_per_s:.2f}",
                f"{measured.tpot_s * 1e3:.1f}",
                f"{simulated.tpot_s * 1e3:.1f}",
                f"{simulated.tpot_s / measured.tpot_s:.2f}",
            )
    console = Console(highlight=False)
    console.print(table)
    console.print(f"prefill + decode + shards; measured: medians of {options.repeats}. Goal: within 0.80 to 1.20")
    console.print(
        f"others than members: {others.cores:.2f} cores, and {others.per_token_s * 1e3:.2f} ms for each token"
    )


def _config(model_dir: str, sizes: tuple[int, int, int], worker_threads: int) -> OctetConfig:
    """With as many threads as what the costs were measured with."""
    pools = dict(zip(("prefill", "decode", "experts"), sizes, strict=True))
    given: dict[str, object] = {"model.path": model_dir, "kv.memory_gib": 0.25, "frontend.port": 0}
    given |= {f"pools.{pool}.{field}": value for pool, size in pools.items() for field, value in
              (("size", size), ("threads", 1 if pool == "experts" else worker_threads))}  # fmt: skip
    given["ray.namespace"] = f"octet-{uuid.uuid4().hex[:8]}"
    return load_config(overrides=[f"{field}={value}" for field, value in given.items()])


async def _others(config: OctetConfig, options: ValidationOptions) -> Others:
    cluster = await asyncio.to_thread(launch, config)
    try:
        async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
            vocab_size = (await client.model_info()).vocab_size
            pids = [member.pid for pool in (await client.status()).pools for member in pool.members]
            one = Arrival(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
            streams = max(1, options.streams // 2)
            await closed_loop(client, [one] * streams, streams, vocab_size)
            before_s = _others_s(pids)
            await asyncio.sleep(_IDLE_S)
            idle = (_others_s(pids) - before_s) / _IDLE_S
            before_s = _others_s(pids)
            outcomes, duration_s = await closed_loop(client, [one] * options.requests, streams, vocab_size)
            tokens = sum(len(outcome.token_times_s) for outcome in outcomes)
            return Others(cores=idle, per_token_s=max(0.0, _others_s(pids) - before_s - idle * duration_s) / tokens)
    finally:
        await asyncio.to_thread(cluster.stop, drain=False)


def _others_s(pids: Sequence[int]) -> float:
    """Processor time of this machine so far, but for these processes (Linux)."""
    # user, nice, system; then idle, iowait, irq, softirq.
    fields = list(map(int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]))
    busy = sum(fields[:3]) + sum(fields[5:])
    for pid in pids:
        of_process = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        busy -= int(of_process[11]) + int(of_process[12])
    return busy / os.sysconf("SC_CLK_TCK")


async def _measured(config: OctetConfig, options: ValidationOptions) -> Figures:
    cluster = await asyncio.to_thread(launch, config)
    try:
        async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
            vocab_size = (await client.model_info()).vocab_size
            one = Arrival(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
            await closed_loop(client, [one] * options.streams, options.streams, vocab_size)
            found = []
            for _ in range(options.repeats):
                outcomes, duration_s = await closed_loop(client, [one] * options.requests, options.streams, vocab_size)
                found.append(summarize(outcomes, duration_s, _TIMEOUT_S, _TIMEOUT_S))
    finally:
        await asyncio.to_thread(cluster.stop, drain=False)
    return Figures(
        tokens_per_s=statistics.median(one.tokens_per_s for one in found),
        tpot_s=statistics.median(one.tpot_s.p50 for one in found),
    )


def _simulated(
    config: OctetConfig, sizes: tuple[int, int, int], model_dir: str, costs: Costs, options: ValidationOptions
) -> Figures:
    shape = shape_of(model_dir, 4)
    loads = drawn(len(shape.moe_layers), shape.num_experts, shape.experts_per_token, np.random.default_rng(0), _ALPHA)
    one = Request(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens, blocks=())
    pages = 10**6
    run = Simulation(
        [one] * options.requests,
        loads,
        shape,
        costs,
        config,
        Options(
            sizes=dict(zip(("prefill", "decode", "experts"), sizes, strict=True)),
            redundant=0,
            slots_that_fit=shape.num_experts,
            prefill_pages=pages,
            decode_pages=pages,
            autoscale=False,
            balance=False,
            gpu=False,
            seed=0,
            tick_s=_TICK_S,
            streams=options.streams,
        ),
    ).run()
    result = summarized(run, 0.0)
    return Figures(tokens_per_s=result.tokens_per_s, tpot_s=result.tpot_s.p50)


def _costs(model_dir: str, calibration: pathlib.Path, cores: int) -> Costs:
    shape = shape_of(model_dir, 4)
    return calibrated(from_rates(CPU, shape, shape.num_experts, cores), calibration, shape)
