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
from ops.bench.summary import Percentiles, counted, errors_of, in_ms, measured, require_success

REFUSED, LATE = grpc.StatusCode.RESOURCE_EXHAUSTED.name, grpc.StatusCode.DEADLINE_EXCEEDED.name
_NOW_AND_THEN_S = 0.1
_WIDTH = 150
"""Of the table, also where output goes to a file."""


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
    """Requests that were sent, over the time that it took to send them; less than meant where the generator could not
    keep up."""
    max_lag_s: float
    """The most that a request was sent after it was due."""
    goodput_per_s: float
    """Requests per second that were complete within their deadline, which begins with their sending."""
    requests: int
    refused: int
    late: int
    """Accepted, and not complete within the deadline."""
    failed: dict[str, int]
    """Those that ended in any other way, by status code."""
    refusal_s: Percentiles | None
    """As those saw it who offer the load, from when each request was due."""
    bystander_refused: int
    bystander_refusal_s: Percentiles | None
    ttft_s: Percentiles | None
    """From when a request was due."""


def bench_overload(address: str, options: OverloadOptions, json_file: pathlib.Path | None) -> None:
    """Print a table; with `json_file`, write the same numbers there.

    Raises: CallError if the cluster does not answer, UnavailableError if nothing succeeds even in the closed loop.
    """
    sustainable_per_s, rows = asyncio.run(_run(address, options))
    _print(sustainable_per_s, rows, options.seed)
    if json_file is not None:
        found = {
            "seed": options.seed,
            "sustainable_per_s": sustainable_per_s,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        json_file.write_text(json.dumps(found, indent=2) + "\n")


def to_row(multiple: float, outcomes: Sequence[Outcome], seconds: float, bystander_s: Sequence[float]) -> Row:
    """
    Args:
        outcomes: of every request of the load; one at least.
        seconds: over which they were to be sent.
        bystander_s: after which time each of the bystander's requests was refused that were.
    """
    good = [outcome for outcome in outcomes if not outcome.error]
    refused = [outcome for outcome in outcomes if outcome.error == REFUSED]
    in_time = sum(seconds / 2 <= outcome.due_s + outcome.end_s < seconds for outcome in good)
    sending_s = max(seconds, *(outcome.due_s + outcome.lag_s for outcome in outcomes))
    return Row(
        multiple=multiple,
        offered_per_s=len(outcomes) / sending_s,
        max_lag_s=max(outcome.lag_s for outcome in outcomes),
        goodput_per_s=in_time / (seconds / 2),
        requests=len(outcomes),
        refused=len(refused),
        late=sum(outcome.error == LATE for outcome in outcomes),
        failed=errors_of(outcome for outcome in outcomes if outcome.error not in (REFUSED, LATE)),
        refusal_s=measured([outcome.end_s for outcome in refused]),
        bystander_refused=len(bystander_s),
        bystander_refusal_s=measured(bystander_s),
        ttft_s=measured([outcome.ttft_s for outcome in good]),
    )


async def _run(address: str, options: OverloadOptions) -> tuple[float, list[Row]]:
    async with AsyncClient(address, timeout_s=600.0) as client:
        info = await client.model_info(timeout_s=30.0)
        each = Arrival(at_s=0.0, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
        draw = random.Random(f"prompts {options.seed}")
        # Once for what is compiled and measured on first use.
        await closed_loop(client, [each] * options.streams, options.streams, info.vocab_size, draw)
        outcomes, duration_s = await closed_loop(
            client, [each] * 4 * options.streams, options.streams, info.vocab_size, draw
        )
    require_success(outcomes)
    sustainable_per_s = sum(not outcome.error for outcome in outcomes) / duration_s
    rows = []
    for multiple in options.multiples:
        rate = multiple * sustainable_per_s
        num_requests = max(1, round(rate * options.seconds))
        arrivals = poisson(rate, num_requests, options.prompt_tokens, options.new_tokens, options.seed)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
            loop = asyncio.get_running_loop()
            async with AsyncClient(address, timeout_s=options.deadline_s) as client:
                # What is started and connected once takes no time from the load.
                await loop.run_in_executor(processes, _begin)
                await client.model_info(timeout_s=30.0)
                standing_by = loop.run_in_executor(
                    processes, _stand_by, address, options, info.vocab_size, arrivals[-1].at_s
                )
                outcomes, _ = await open_loop(client, arrivals, info.vocab_size, draw)
            bystander_s = await standing_by
        rows.append(to_row(multiple, outcomes, arrivals[-1].at_s, bystander_s))
    return sustainable_per_s, rows


def _begin() -> None:
    """Nothing; whoever is asked for it has imported this module."""


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


def _print(sustainable_per_s: float, rows: Sequence[Row], seed: int) -> None:
    console = Console(highlight=False, width=_WIDTH)
    peak = max(row.goodput_per_s for row in rows) or 1.0
    console.print(f"sustainable: {sustainable_per_s:.2f} requests/s in a closed loop (seed {seed})")
    table = Table(box=None, pad_edge=False)
    names = ("× sustainable", "offered/s", "lag ms", "goodput/s", "÷ peak", "refused", "late", "failed")
    for name in (*names, "refusal ms p50", "p99", "a bystander's p50", "p99", "TTFT ms p50"):
        table.add_column(name, justify="right")
    for row in rows:
        refusal, bystander = in_ms(row.refusal_s, 1), in_ms(row.bystander_refusal_s, 1)
        table.add_row(
            f"{row.multiple:g}",
            f"{row.offered_per_s:.1f}",
            f"{row.max_lag_s * 1000:.0f}",
            f"{row.goodput_per_s:.2f}",
            f"{row.goodput_per_s / peak:.2f}",
            f"{row.refused} of {row.requests}",
            f"{row.late}",
            counted(row.failed) or "0",
            *(refusal[0], refusal[2]),
            *(bystander[0], bystander[2]),
            in_ms(row.ttft_s, 0)[0],
        )
    console.print(table)
    console.print("lag: the most that a request was sent after its time, from which its latencies count")
