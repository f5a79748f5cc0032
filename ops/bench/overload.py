"""`octet bench overload`: more load than a running cluster can serve, and what becomes of goodput and of refusals.

Whoever follows hundreds of streams is late for everything. So a bystander, in a process of its own, asks now and then,
and notes how soon it is refused: a user who has one request.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import pathlib
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import grpc
from rich.console import Console
from rich.table import Table

from octet.client import AsyncClient, CallError
from ops.bench.load import Arrival, Outcome, closed_loop, open_loop, poisson
from ops.bench.summary import Percentiles, percentiles

REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED.name
_NOW_AND_THEN_S = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OverloadOptions:
    streams: int
    """Of the closed loop that finds the sustainable rate."""
    multiples: tuple[float, ...]
    seconds: float
    deadline_s: float
    prompt_tokens: int
    new_tokens: int
    seed: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One offered rate. Goodput is that of the second half of the arrivals' time, when the queues are as they stay."""

    multiple: float
    offered_per_s: float
    goodput_per_s: float
    """Requests per second that were complete within their deadline."""
    requests: int
    refused: int
    late: int
    """Accepted, and not complete within the deadline."""
    refusal_s: Percentiles
    """As those saw it who offer the load."""
    bystander_refused: int
    bystander_refusal_s: Percentiles
    ttft_s: Percentiles


def bench_overload(address: str, options: OverloadOptions, json_file: pathlib.Path | None) -> None:
    """Print a table; with `json_file`, write the same numbers there.

    Raises: CallError if the cluster does not answer.
    """
    sustainable_per_s, rows = asyncio.run(_run(address, options))
    _print(sustainable_per_s, rows)
    if json_file is not None:
        found = {"sustainable_per_s": sustainable_per_s, "rows": [dataclasses.asdict(row) for row in rows]}
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def to_row(
    multiple: float, rate: float, outcomes: Sequence[Outcome], seconds: float, bystander_s: Sequence[float]
) -> Row:
    """
    Args:
        rate: offered requests per second.
        seconds: over which they were offered.
        bystander_s: after which time each of the bystander's requests was refused that were.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    refused = [outcome for outcome in outcomes if outcome.error == REFUSED]
    in_time = sum(seconds / 2 <= outcome.sent_s + outcome.end_s < seconds for outcome in good)
    return Row(
        multiple=multiple,
        offered_per_s=rate,
        goodput_per_s=in_time / (seconds / 2),
        requests=len(outcomes),
        refused=len(refused),
        late=len(outcomes) - len(good) - len(refused),
        refusal_s=percentiles([outcome.end_s for outcome in refused]),
        bystander_refused=len(bystander_s),
        bystander_refusal_s=percentiles(bystander_s),
        ttft_s=percentiles([outcome.ttft_s for outcome in good]),
    )


async def _run(address: str, options: OverloadOptions) -> tuple[float, list[Row]]:
    async with AsyncClient(address, timeout_s=600.0) as client:
        info = await client.model_info(timeout_s=30.0)
        each = Arrival(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
        # Once for what is compiled and measured on first use.
        await closed_loop(client, [each] * options.streams, options.streams, info.vocab_size)
        outcomes, duration_s = await closed_loop(client, [each] * 4 * options.streams, options.streams, info.vocab_size)
    sustainable_per_s = sum(not outcome.error for outcome in outcomes) / duration_s
    rows = []
    for multiple in options.multiples:
        rate = multiple * sustainable_per_s
        num_requests = max(1, round(rate * options.seconds))
        arrivals = poisson(rate, num_requests, options.prompt_tokens, options.new_tokens, options.seed)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            loop = asyncio.get_running_loop()
            standing_by = loop.run_in_executor(
                processes, _stand_by, address, options, info.vocab_size, arrivals[-1].at_s
            )
            async with AsyncClient(address, timeout_s=options.deadline_s) as client:
                outcomes, _ = await open_loop(client, arrivals, info.vocab_size)
            bystander_s = await standing_by
        rows.append(to_row(multiple, rate, outcomes, arrivals[-1].at_s, bystander_s))
    return sustainable_per_s, rows


def _stand_by(address: str, options: OverloadOptions, vocab_size: int, seconds: float) -> list[float]:
    """Ask for the same, and leave where it is accepted. Returns: seconds until each refusal."""

    async def ask_now_and_then() -> list[float]:
        refused_s: list[float] = []
        until_s = time.monotonic() + seconds
        async with AsyncClient(address, timeout_s=options.deadline_s, resume=False) as client:
            while time.monotonic() < until_s:
                prompt = random.choices(range(vocab_size), k=options.prompt_tokens)
                begun_s = time.perf_counter()
                try:
                    chunks = client.stream(prompt, max_new_tokens=options.new_tokens, ignore_eos=True)
                    async with contextlib.aclosing(chunks):
                        await anext(chunks)
                except CallError as error:
                    if error.code.name == REFUSED:
                        refused_s.append(time.perf_counter() - begun_s)
                await asyncio.sleep(_NOW_AND_THEN_S)
        return refused_s

    return asyncio.run(ask_now_and_then())


def _print(sustainable_per_s: float, rows: Sequence[Row]) -> None:
    console = Console(highlight=False)
    peak = max(row.goodput_per_s for row in rows) or 1.0
    console.print(f"sustainable: {sustainable_per_s:.2f} requests/s in a closed loop")
    table = Table(box=None, pad_edge=False)
    names = ("× sustainable", "offered/s", "goodput/s", "÷ peak", "refused", "late", "refusal ms p50", "p99")
    for name in (*names, "a bystander's p50", "p99", "TTFT ms p50"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.multiple:g}",
            f"{row.offered_per_s:.1f}",
            f"{row.goodput_per_s:.2f}",
            f"{row.goodput_per_s / peak:.2f}",
            f"{row.refused} of {row.requests}",
            f"{row.late}",
            f"{row.refusal_s.p50 * 1000:.1f}",
            f"{row.refusal_s.p99 * 1000:.1f}",
            f"{row.bystander_refusal_s.p50 * 1000:.1f}",
            f"{row.bystander_refusal_s.p99 * 1000:.1f}",
            f"{row.ttft_s.p50 * 1000:.0f}",
        )
    console.print(table)
