"""`octet bench longcontext`: memory and time to the first token as prompts get longer, up to the whole context.

One process holds a prefill engine, a decode engine and a shard; a prompt goes all the way, hand-off included. What is
measured is what it takes beside its pages, whose memory is there from the start. The floor of the time is quadratic:
every token looks at all before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import pathlib
import random
import tempfile
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from ops.bench.checkpoints import BENCH, write_checkpoint

if TYPE_CHECKING:
    from ops.local import LocalEngine

_CONTEXT, _PAGE_SIZE, _NEW_TOKENS = 32768, 16, 8
_LENGTHS = (2048, 8192, _CONTEXT)
_DEADLINE_S = 600.0
SMALL: dict[str, Any] = {
    **BENCH,
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "max_position_embeddings": _CONTEXT,
}
"""Small enough for a prompt of 32K tokens in some ten seconds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """What one sequence of `num_tokens`, prompt and answer, took."""

    num_tokens: int
    ttft_s: float
    peak_bytes: int
    """Resident memory at its peak, less what it was before."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    points: list[Point]
    kv_bytes_per_token: float
    """Growth of resident memory when the pages are made."""
    formula_bytes_per_token: int


def bench_longcontext() -> None:
    """Print time and memory by length; then KV bytes per token against the formula."""
    with tempfile.TemporaryDirectory() as scratch:
        write_checkpoint(pathlib.Path(scratch), SMALL)
        measured = measure(pathlib.Path(scratch), _LENGTHS)
    table = Table(box=None, pad_edge=False)
    for column in ("tokens", "TTFT ms", "÷ shortest", "peak MiB beside the pages", "pages' MiB"):
        table.add_column(column, justify="right")
    first = measured.points[0]
    for point in measured.points:
        table.add_row(
            str(point.num_tokens),
            f"{point.ttft_s * 1000:.0f}",
            f"{point.ttft_s / first.ttft_s:.1f}",
            f"{point.peak_bytes / 2**20:.1f}",
            f"{point.num_tokens * measured.formula_bytes_per_token / 2**20:.1f}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"KV bytes per token: {measured.kv_bytes_per_token:.0f} resident, {measured.formula_bytes_per_token} by "
        f"`octet check`, ratio {measured.kv_bytes_per_token / measured.formula_bytes_per_token:.3f}"
    )


def measure(model_dir: pathlib.Path, lengths: Sequence[int]) -> Measured:
    """In a process of its own; the longest length is all that its pages hold."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (str(model_dir), tuple(lengths)))


def _measure(model_dir: str, lengths: Sequence[int]) -> Measured:
    from cluster.workers.process import resident_bytes
    from model.census import take_census
    from model.config import read_config
    from model.kv_cache import KvCache
    from ops.local import LocalEngine

    num_pages = -(-max(lengths) // _PAGE_SIZE)
    config = read_config(pathlib.Path(model_dir))
    # The first one also takes what the libraries need for any.
    for pages in (1, num_pages):
        before = resident_bytes()
        cache = KvCache(config, pages, _PAGE_SIZE, torch.float32, torch.device("cpu"))
        held = resident_bytes() - before
        del cache
    engine = LocalEngine(pathlib.Path(model_dir), num_pages=num_pages, page_size=_PAGE_SIZE)
    with contextlib.closing(engine):
        for _ in range(2):
            _sequence(engine, min(lengths))
        return Measured(
            points=[_sequence(engine, num_tokens) for num_tokens in lengths],
            kv_bytes_per_token=held / (num_pages * _PAGE_SIZE),
            formula_bytes_per_token=take_census(engine.config, 4, 4).kv_bytes_per_token,
        )


def _sequence(engine: LocalEngine, num_tokens: int) -> Point:
    """A prompt of random tokens and an answer, `num_tokens` together."""
    from ops.local import make_request

    prompt = random.choices(range(engine.config.vocab_size), k=num_tokens - _NEW_TOKENS)
    before = _resident(reset_peak=True)
    start_s = time.perf_counter()
    journal = engine.submit(make_request(prompt, max_new_tokens=_NEW_TOKENS))
    ttft_s = None
    while not journal.ended:
        committed = engine.step()
        passed_s = time.perf_counter() - start_s
        assert passed_s < _DEADLINE_S, f"{num_tokens} tokens are computed in time"
        ttft_s = passed_s if committed and ttft_s is None else ttft_s
    assert ttft_s is not None, "an answer has a first token"
    return Point(num_tokens=num_tokens, ttft_s=ttft_s, peak_bytes=_resident("VmHWM") - before)


def _resident(field: str = "VmRSS", *, reset_peak: bool = False) -> int:
    """Resident memory of this process, or its peak (`VmHWM`), in bytes."""
    proc = pathlib.Path("/proc/self")
    if reset_peak:
        (proc / "clear_refs").write_text("5")
    line = next(line for line in (proc / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
