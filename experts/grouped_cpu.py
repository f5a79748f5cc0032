"""Grouped SwiGLU on an fp32 CPU: one compiled call per shard and layer, over weights packed in panels.

A loop of GEMM calls over experts spends its time on overhead and on packing weights when an expert has one or two rows.

Shapes: `U` rows, `K` experts per row, `S` slots, `H` hidden, `I` intermediate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.linear_cpu import linear_rows, silu_product
from model.tiles_cpu import PANEL, declare

_ROWS = 192
"""Rows of one expert that are gathered at a time."""


@declare(  # type: ignore[untyped-decorator]
    "i8(f4[:,::1], i4[:,::1], f4[:,::1], f4[:,:,:,::1], f4[:,:,:,::1], b1[::1], i8[::1], f4[:,::1])",
)
def grouped_swiglu(x: Any, slots: Any, weights: Any, gate_up: Any, down: Any, held: Any, counts: Any, y: Any) -> Any:
    """For each row, the weighted sum of its experts: `y = Σ w · down(silu(gate(x)) · up(x))`.

    Args:
        x: `[U, H]`.
        slots: `[U, K]`; negative entries are skipped.
        weights: `[U, K]`.
        gate_up: `[S, 2 · ceil(I / 16), H, 16]`, the gate's panels first.
        down: `[S, ceil(H / 16), I, 16]`.
        held: `[S]`, whether a slot holds an expert.
        counts: `[S]`, to which the rows of each slot are added.
        y: `[U, H]`, overwritten.

    Returns: -1, or the first slot asked for that holds no expert; then nothing was computed or counted.
    """
    num_rows, top_k = slots.shape
    num_slots, hidden, intermediate = held.shape[0], x.shape[1], down.shape[2]
    begins = np.zeros(num_slots + 1, np.int64)
    for row in range(num_rows):
        for k in range(top_k):
            slot = slots[row, k]
            if slot >= 0:
                if slot >= num_slots or not held[slot]:
                    return slot
                begins[slot + 1] += 1
    largest = 0
    for slot in range(num_slots):
        counts[slot] += begins[slot + 1]
        largest = max(largest, begins[slot + 1])
        begins[slot + 1] += begins[slot]
    row_of, weight_of = np.empty(begins[num_slots], np.int64), np.empty(begins[num_slots], np.float32)
    ends = begins[:num_slots].copy()
    for row in range(num_rows):
        for k in range(top_k):
            slot = slots[row, k]
            if slot >= 0:
                row_of[ends[slot]] = row
                weight_of[ends[slot]] = weights[row, k]
                ends[slot] += 1
    room = min(largest, _ROWS)
    half = gate_up.shape[1] // 2 * PANEL
    x_of, y_of = np.empty((room, hidden), np.float32), np.empty((room, hidden), np.float32)
    h_of, activated = np.empty((room, 2 * half), np.float32), np.empty((room, intermediate), np.float32)
    no_bias = np.empty(0, np.float32)
    y[:] = 0
    for slot in range(num_slots):
        for first in range(begins[slot], begins[slot + 1], _ROWS):
            n = min(_ROWS, begins[slot + 1] - first)
            for i in range(n):
                x_of[i] = x[row_of[first + i]]
            linear_rows(x_of[:n], gate_up[slot], no_bias, h_of[:n])
            for i in range(n):
                silu_product(h_of[i, :half], h_of[i, half:], activated[i])
            linear_rows(activated[:n], down[slot], no_bias, y_of[:n])
            for i in range(n):
                row, weight = row_of[first + i], weight_of[first + i]
                for j in range(hidden):
                    y[row, j] += weight * y_of[i, j]
    return -1
