"""Grouped SwiGLU over the experts that were hit.

Shapes: `U` rows, `K` experts per row, `S` slots, `H` hidden, `I` intermediate, `N` (row, slot) pairs.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F


def grouped_swiglu(
    x_UH: torch.Tensor,
    slots_UK: torch.Tensor,
    weights_UK: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    counts_S: npt.NDArray[np.int64],
) -> torch.Tensor:
    """For each row, the weighted sum of its experts: `Σ w · down(silu(gate(x)) · up(x))`, `[U, H]` in fp32.

    Args:
        slots_UK: int32; negative entries are skipped.
        gate_up: `[S, 2I, H]`.
        down: `[S, H, I]`.
        counts_S: rows that each slot is asked for, as `count_slots` gives them.
    """
    pairs = (slots_UK >= 0).nonzero()
    slots_N = slots_UK[pairs[:, 0], pairs[:, 1]]
    order = slots_N.argsort(stable=True)
    rows_N = pairs[order, 0]
    weights_N1 = weights_UK[rows_N, pairs[order, 1]].unsqueeze(1)
    y_UH = torch.zeros(x_UH.shape, dtype=torch.float32, device=x_UH.device)
    x_NH = x_UH[rows_N]
    first = 0
    for slot, count in enumerate(counts_S.tolist()):
        if count:
            group = slice(first, first + count)
            gate, up = F.linear(x_NH[group], gate_up[slot]).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down[slot])
            y_UH.index_add_(0, rows_N[group], out.float() * weights_N1[group])
            first += count
    return y_UH


def count_slots(slots_UK: torch.Tensor, num_slots: int) -> npt.NDArray[np.int64]:
    """How many rows ask for each slot, `[S]`; one longer if any ask for slots beyond the last, with their number."""
    # Shifted by one so that "elsewhere" (-1) has a bin of its own, which is dropped.
    return np.bincount(slots_UK.clamp(-1, num_slots).cpu().numpy().ravel() + 1, minlength=num_slots + 1)[1:]


@functools.cache
def grouped_gpu() -> ModuleType:
    """The same on a GPU, without waiting for it. Triton is imported here, so that CPU shards do without it."""
    return importlib.import_module("experts.grouped_gpu")


@functools.cache
def grouped_cpu() -> ModuleType:
    """The same over panels of an fp32 CPU. Numba is imported here, so that GPU shards do without it."""
    return importlib.import_module("experts.grouped_cpu")
