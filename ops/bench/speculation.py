"""`octet bench speculation`: what drafts cost. A random head is never right, so every step brings one token.

A step with `k` drafts that takes `c` times a step without them pays as soon as it brings more than `c` tokens per
sequence. Measured on the one-process engine with the benchmark's random checkpoint plus an MTP layer.
"""

from __future__ import annotations

import contextlib
import pathlib
import random
import statistics
import tempfile
import time

from rich.console import Console
from rich.table import Table

from model.threads import set_num_threads
from octet.config import SpeculationConfig
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.local import DECODE, LocalEngine, make_request

_PROMPT_TOKENS, _WARM_UP, _STEPS, _ROUNDS = 128, 3, 12, 5
_LENGTHS = (0, 1, 2, 3)
_DEADLINE_S = 120.0
_MAX_NEW_TOKENS, _NUM_PAGES = 100, 256
"""Pages for eight whole answers, or some would not be let in."""


def bench_speculation(num_threads: int) -> None:
    """Print the median step of each number of drafts, relative to none. Rounds alternate between them."""
    set_num_threads(num_threads, own=True)
    table = Table(box=None, pad_edge=False)
    for column in ("sequences", "drafts", "step ms", "÷ none"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as scratch:
        model_dir = pathlib.Path(scratch)
        write_checkpoint(model_dir, {**BENCH, "num_nextn_predict_layers": 1})
        for num_sequences in (1, 8):
            times: dict[int, list[float]] = {length: [] for length in _LENGTHS}
            for _ in range(_ROUNDS):
                for length in _LENGTHS:
                    times[length].append(_step_s(model_dir, num_sequences, length))
            none_s = statistics.median(times[0])
            for length in _LENGTHS:
                step_s = statistics.median(times[length])
                table.add_row(str(num_sequences), str(length), f"{step_s * 1e3:.1f}", f"{step_s / none_s:.2f}")
    Console(highlight=False).print(table)


def _step_s(model_dir: pathlib.Path, num_sequences: int, length: int) -> float:
    speculation = SpeculationConfig(num_speculative_tokens=length, adaptive=False)
    with contextlib.closing(LocalEngine(model_dir, num_pages=_NUM_PAGES, speculation=speculation)) as engine:
        for _ in range(num_sequences):
            prompt = random.choices(range(engine.config.vocab_size), k=_PROMPT_TOKENS)
            engine.submit(make_request(prompt, max_new_tokens=_MAX_NEW_TOKENS))
        deadline_s = time.monotonic() + _DEADLINE_S
        while engine.load()[DECODE].running < num_sequences:
            assert time.monotonic() < deadline_s, "the prompts are computed in time"
            engine.step()
        for _ in range(_WARM_UP):
            engine.step()
        start_s = time.perf_counter()
        for _ in range(_STEPS):
            engine.step()
        return (time.perf_counter() - start_s) / _STEPS
