"""`octet bench sampling`: a decode step's choice of tokens on a CPU, against the operators that GPUs run.

Logits are normal numbers of three times the unit's spread; each sequence has its own seed and position.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.sampler import SampleRow, sample, sample_by_operators
from octet.request import Output, Sampling, Stopping

_REPEATS = 5
_PROMPT, _ANSWER = 128, 128
_SETTINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("greedy", {}),
    ("temperature", {"temperature": 0.7}),
    ("top-p", {"temperature": 1.0, "top_p": 0.95}),
    ("top-k, top-p", {"temperature": 1.0, "top_k": 40, "top_p": 0.95}),
    ("repetition penalty", {"repetition_penalty": 1.1}),
)


def bench_sampling(
    threads: int, vocab_sizes: Sequence[int] = (8192, 151_552), row_counts: Sequence[int] = (1, 8, 32)
) -> None:
    """Medians of five, in ms a step."""
    torch.set_num_threads(threads)
    table = Table(box=None, pad_edge=False)
    for column in ("vocabulary", "sampling", "rows", "compiled ms", "operators ms", "operators ÷ compiled"):
        table.add_column(column, justify="left" if column == "sampling" else "right")
    for vocab_size in vocab_sizes:
        for name, settings in _SETTINGS:
            for num_rows in row_counts:
                logits_BV = 3 * torch.randn(num_rows, vocab_size)
                rows = [_row(settings, vocab_size) for _ in range(num_rows)]
                compiled_s, operators_s = _measured(logits_BV, rows)
                cells = (f"{compiled_s * 1e3:.2f}", f"{operators_s * 1e3:.2f}", f"{operators_s / compiled_s:.0f}")
                table.add_row(str(vocab_size), name, str(num_rows), *cells)
    Console(highlight=False).print(table)


def _row(settings: dict[str, Any], vocab_size: int) -> SampleRow:
    return SampleRow(
        sampling=Sampling(seed=random.getrandbits(63), **settings),
        stopping=Stopping(max_new_tokens=1000),
        output=Output(),
        choice=0,
        token_ids=random.choices(range(vocab_size), k=_PROMPT + _ANSWER),
        num_prompt_tokens=_PROMPT,
    )


def _measured(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> tuple[float, float]:
    compiled, operators = [], []
    for _ in range(_REPEATS):
        compiled.append(_seconds(sample, logits_BV, rows))
        operators.append(_seconds(sample_by_operators, logits_BV, rows))
    return statistics.median(compiled), statistics.median(operators)


def _seconds(
    choose: Callable[[torch.Tensor, Sequence[SampleRow]], list[int]], logits_BV: torch.Tensor, rows: Sequence[SampleRow]
) -> float:
    start_s = time.perf_counter()
    choose(logits_BV, rows)
    return time.perf_counter() - start_s
