"""`octet bench linear`: linear layers over packed panels, against torch's operator on the same fp32 weights.

Every call takes the next of many matrices, as the layers of a model do, so that weights come from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from model.linear import PackedMatrix, Packer, linear

_BYTES, _REPEATS = 128 * 2**20, 5
_Weight = TypeVar("_Weight", torch.Tensor, PackedMatrix)


def bench_linear(
    shapes: Sequence[tuple[int, int]] = ((1536, 512), (512, 256), (8192, 512)),
    row_counts: Sequence[int] = (1, 2, 4, 8, 16, 32, 128, 512),
) -> None:
    """Medians of five, one thread, in µs; and the rate at which weights were read and numbers multiplied."""
    torch.set_num_threads(1)
    table = Table(box=None, pad_edge=False)
    for column in ("weights", "rows", "panels µs", "torch µs", "torch ÷ panels", "GB/s", "GFLOP/s"):
        table.add_column(column, justify="right")
    for columns, depth in shapes:
        for num_rows, panels_s, torch_s in _measured(columns, depth, row_counts):
            work = columns * depth
            table.add_row(
                f"{columns}×{depth}",
                str(num_rows),
                f"{panels_s * 1e6:.0f}",
                f"{torch_s * 1e6:.0f}",
                f"{torch_s / panels_s:.1f}",
                f"{4 * work / panels_s / 1e9:.1f}",
                f"{2 * work * num_rows / panels_s / 1e9:.0f}",
            )
    Console(highlight=False).print(table)


def _measured(columns: int, depth: int, row_counts: Sequence[int]) -> Iterator[tuple[int, float, float]]:
    plain = [torch.randn(columns, depth) for _ in range(max(2, _BYTES // (columns * depth * 4)))]
    packer = Packer()
    packed = []
    for weight in plain:
        matrix, rows = packer.matrix(columns, depth)
        rows.copy_(weight)
        packed.append(matrix)
    packer.pack()
    for num_rows in row_counts:
        x_TH = torch.randn(num_rows, depth)
        by_panels, by_torch = [], []
        for _ in range(_REPEATS):
            by_panels.append(_seconds_per_call(linear, x_TH, packed))
            by_torch.append(_seconds_per_call(F.linear, x_TH, plain))
        yield num_rows, statistics.median(by_panels), statistics.median(by_torch)


@torch.inference_mode()
def _seconds_per_call(
    multiply: Callable[[torch.Tensor, _Weight], torch.Tensor], x_TH: torch.Tensor, weights: Sequence[_Weight]
) -> float:
    start_s = time.perf_counter()
    for weight in weights:
        multiply(x_TH, weight)
    return (time.perf_counter() - start_s) / len(weights)
