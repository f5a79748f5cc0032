"""`octet bench serve`: load on a running cluster, closed-loop or open-loop. What latencies are: `ops.bench.load`."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import pathlib
import random

from rich.console import Console
from rich.table import Table

from octet.client import AsyncClient
from octet.errors import ConfigError
from ops.bench.load import Arrival, Outcome, closed_loop, open_loop, poisson, read_trace
from ops.bench.plot import draw_load, require_matplotlib
from ops.bench.summary import Summary, counted, in_ms, require_success, summarize


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Exactly one of `streams`, `rate` and `trace` is given."""

    streams: int | None
    rate: float | None
    trace: pathlib.Path | None
    requests: int
    prompt_tokens: int
    new_tokens: int
    time_scale: float
    length_scale: float
    slo_ttft_s: float
    slo_tpot_s: float
    seed: int
    """Of arrivals and prompts: a cluster that has served the same seed before may have its prompts in a cache."""
    stream_interval: int | None = None
    """Of every request; None takes the server's."""


def bench_serve(
    address: str, options: LoadOptions, json_file: pathlib.Path | None, plot_file: pathlib.Path | None = None
) -> None:
    """Print a table; with `json_file`, write the same numbers there; with `plot_file`, draw them as a PNG.

    Raises: ConfigError for contradicting options, a trace that is none or a plot without matplotlib, CallError if the
        cluster does not answer; once all is written, UnavailableError if every request failed.
    """
    given = [name for name in ("streams", "rate", "trace") if getattr(options, name) is not None]
    if len(given) != 1:
        raise ConfigError("bench serve", ", ".join(given) or "no load", "exactly one of --streams, --rate, --trace")
    if plot_file is not None:
        require_matplotlib(plot_file)
    outcomes, duration_s = asyncio.run(_run(address, options))
    summary = summarize(outcomes, duration_s, options.slo_ttft_s, options.slo_tpot_s)
    _print(summary, options.seed)
    if json_file is not None:
        json_file.write_text(json.dumps({"seed": options.seed, **dataclasses.asdict(summary)}, indent=2) + "\n")
    if plot_file is not None:
        draw_load(plot_file, outcomes, summary, options.slo_ttft_s, options.slo_tpot_s)
    require_success(outcomes)


async def _run(address: str, options: LoadOptions) -> tuple[list[Outcome], float]:
    async with AsyncClient(address, timeout_s=600.0) as client:
        info = await client.model_info(timeout_s=30.0)
        arrivals = [
            dataclasses.replace(arrival, stream_interval=options.stream_interval)
            for arrival in _arrivals(options, info.max_model_len)
        ]
        draw = random.Random(f"prompts {options.seed}")
        if options.streams is not None:
            return await closed_loop(client, arrivals, options.streams, info.vocab_size, draw)
        return await open_loop(client, arrivals, info.vocab_size, draw)


def _arrivals(options: LoadOptions, max_len: int) -> list[Arrival]:
    if options.trace is not None:
        return read_trace(options.trace, options.requests, options.time_scale, options.length_scale, max_len)
    if options.rate is not None:
        return poisson(options.rate, options.requests, options.prompt_tokens, options.new_tokens, options.seed)
    each = Arrival(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
    return [each] * options.requests


def _print(summary: Summary, seed: int) -> None:
    console = Console(highlight=False)
    errors = counted(summary.errors) or "none"
    console.print(f"{summary.requests} requests in {summary.duration_s:.1f} s (seed {seed}), errors: {errors}")
    if summary.max_lag_s:
        console.print(f"sent up to {summary.max_lag_s * 1000:.1f} ms after their time, from which latencies count")
    console.print(
        f"{summary.tokens_per_s:.1f} tokens/s generated, {summary.prompt_tokens_per_s:.1f} prompt tokens/s, "
        f"goodput {summary.goodput_per_s:.2f} requests/s"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("ms", "p50", "p95", "p99"):
        table.add_column(column, justify="left" if column == "ms" else "right")
    rows = (("TTFT", summary.ttft_s), ("TPOT", summary.tpot_s), ("ITL", summary.itl_s), ("end to end", summary.e2e_s))
    for name, values in rows:
        table.add_row(name, *in_ms(values, 1))
    console.print(table)
