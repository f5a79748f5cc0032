"""`octet bench oversubscription`: throughput when more sequences are asked for than the KV pages hold.

A cluster of its own has pages, in either pool, for so many sequences. As many users ask it, and then several times as
many, in alternation; a first round, which warms up, does not count. Users leave at a random length of which the cluster
knows nothing beforehand, so that it has to guess how many sequences will fit, and to preempt where it guessed wrong.
"""

from __future__ import annotations

import asyncio
import pathlib
import random
import statistics
import tempfile
import time
import uuid

from rich.console import Console
from rich.table import Table

from cluster.launch import launch
from octet.client import AsyncClient, Client
from octet.config import load_config
from ops.bench.checkpoints import BENCH, write_checkpoint

_PAGE_SIZE, _PROMPT_TOKENS, _MAX_NEW_TOKENS = 16, 64, 64
_REQUESTS_PER_STREAM = 8
_TIMEOUT_S = 600.0


def bench_oversubscription(streams: int, factor: int, repeats: int) -> None:
    """Print tokens per second of both loads, their ratio and what it took. Raises: CallError."""
    pages = streams * -(-(_PROMPT_TOKENS + _MAX_NEW_TOKENS) // _PAGE_SIZE)
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(pathlib.Path(scratch), BENCH)
        sizes = {"model.path": scratch, "kv.page_size": _PAGE_SIZE, "kv.prefill_pages": pages, "kv.decode_pages": pages}
        names = {"ray.namespace": f"octet-{uuid.uuid4().hex[:8]}", "frontend.port": 0}
        cluster = launch(load_config(values=sizes | names))
        try:
            rates, preemptions = asyncio.run(_run(cluster.address, (streams, streams * factor), repeats))
        finally:
            cluster.stop(drain=False)
    table = Table(box=None, pad_edge=False)
    for column in ("sequences at once", "pages for", "tokens/s", "÷ first", "preemptions per 100 requests"):
        table.add_column(column, justify="right")
    medians = {users: statistics.median(values) for users, values in rates.items()}
    for users, rate in medians.items():
        per_100 = 100 * preemptions[users] / (repeats * streams * _REQUESTS_PER_STREAM)
        table.add_row(str(users), str(streams), f"{rate:.1f}", f"{rate / medians[streams]:.2f}", f"{per_100:.1f}")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"medians of {repeats}; every request got what it asked for")


async def _run(address: str, loads: tuple[int, ...], repeats: int) -> tuple[dict[int, list[float]], dict[int, int]]:
    rates: dict[int, list[float]] = {users: [] for users in loads}
    preemptions = dict.fromkeys(loads, 0)
    num_requests = loads[0] * _REQUESTS_PER_STREAM
    async with AsyncClient(address, timeout_s=_TIMEOUT_S) as client:
        vocab_size = (await client.model_info()).vocab_size
        for number in range(repeats + 1):
            for users in loads:
                before = _preemptions(address)
                rate = await _load(client, users, num_requests, vocab_size)
                # In the first round, what is compiled and measured on first use is.
                if number:
                    rates[users].append(rate)
                    preemptions[users] += _preemptions(address) - before
    return rates, preemptions


async def _load(client: AsyncClient, users: int, num_requests: int, vocab_size: int) -> float:
    """Tokens per second."""
    wanted = [random.randint(_MAX_NEW_TOKENS // 8, _MAX_NEW_TOKENS) for _ in range(num_requests)]
    total, waiting = sum(wanted), list(wanted)

    async def user() -> None:
        while waiting:
            await _ask(client, waiting.pop(), vocab_size)

    start_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(users)))
    return total / (time.perf_counter() - start_s)


async def _ask(client: AsyncClient, wanted: int, vocab_size: int) -> None:
    """Read so many tokens of an answer that could be longer, and leave."""
    prompt = random.choices(range(vocab_size), k=_PROMPT_TOKENS)
    stream = client.stream(prompt, max_new_tokens=_MAX_NEW_TOKENS, ignore_eos=True, temperature=0.0)
    received = 0
    async for chunk in stream:
        received += len(chunk.token_ids)
        if received >= wanted:
            break
    await stream.aclose()
    assert received >= wanted, f"an answer ended after {received} tokens"


def _preemptions(address: str) -> int:
    with Client(address, timeout_s=30.0) as client:
        pools = client.status().pools
    return sum(member.preemptions for pool in pools if pool.name == "decode" for member in pool.members)
