"""`octet bench prefix`: time to the first token of a prompt whose beginning is cached, against one that is new.

The two alternate on a running cluster. Prompts are random, and as long as each other.
"""

from __future__ import annotations

import random
import statistics
import time

from rich.console import Console

from octet.client import Client

_TAIL_TOKENS = 16


def bench_prefix(address: str, prefix_tokens: int, repeats: int) -> None:
    """Print both medians and their ratio. Raises: CallError."""
    with Client(address) as client:
        vocab_size = client.model_info().vocab_size
        shared = random.choices(range(vocab_size), k=prefix_tokens)
        _ttft_s(client, shared, vocab_size)
        new_s, cached_s = [], []
        for _ in range(repeats):
            new_s.append(_ttft_s(client, random.choices(range(vocab_size), k=prefix_tokens), vocab_size))
            cached_s.append(_ttft_s(client, shared, vocab_size))
    new, cached = statistics.median(new_s), statistics.median(cached_s)
    Console(highlight=False).print(
        f"TTFT after a prefix of {prefix_tokens} tokens, medians of {repeats}: "
        f"new {new * 1000:.0f} ms, cached {cached * 1000:.0f} ms, cached ÷ new {cached / new:.3f}"
    )


def _ttft_s(client: Client, prefix: list[int], vocab_size: int) -> float:
    prompt = prefix + random.choices(range(vocab_size), k=_TAIL_TOKENS)
    start_s = time.perf_counter()
    stream = client.stream(prompt, max_new_tokens=1)
    next(stream)
    ttft_s = time.perf_counter() - start_s
    stream.close()
    return ttft_s
