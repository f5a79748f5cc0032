"""Grouped SwiGLU for few rows per expert on a CPU, compiled by numba.

A loop of GEMM calls over experts spends its time on overhead and reads weights far below the memory's rate when an
expert has one or two rows. Here each weight row is read once and meets blocks of four token rows while it is in the
first-level cache; eight accumulators keep the vector units busy.

Shapes: `U` rows, `K` experts per row, `S` slots, `H` hidden, `I` intermediate, `N` rows of one slot.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

_BLOCK = 4
# Sums may be reordered, which is what vectorising them takes; NaN and infinity keep their meaning.
_REORDER = {"reassoc", "contract", "nsz"}


def swiglu_few_rows(
    x_UH: npt.NDArray[np.float32],
    slots_UK: npt.NDArray[np.int32],
    weights_UK: npt.NDArray[np.float32],
    gate_up: npt.NDArray[np.float32],
    down: npt.NDArray[np.float32],
) -> npt.NDArray[np.float32]:
    """As `grouped_swiglu`, `[U, H]`. Releases the GIL. Compiles at its first call, and caches that on disk."""
    y_UH = np.zeros_like(x_UH)
    _grouped(x_UH, slots_UK, weights_UK, gate_up, down, y_UH)
    return y_UH


def warm_up() -> None:
    """Compile, or load what was compiled before, so that no request waits for it."""
    x_UH, weights_UK = np.ones((1, 2), np.float32), np.ones((1, 1), np.float32)
    gate_up, down = np.ones((1, 4, 2), np.float32), np.ones((1, 2, 2), np.float32)
    swiglu_few_rows(x_UH, np.zeros((1, 1), np.int32), weights_UK, gate_up, down)


def _grouped_source(x: Any, slots: Any, weights: Any, gate_up: Any, down: Any, y: Any) -> None:
    num_rows, top_k = slots.shape
    num_slots, hidden, intermediate = down.shape[0], down.shape[1], down.shape[2]
    counts = np.zeros(num_slots, np.int64)
    for row in range(num_rows):
        for k in range(top_k):
            if slots[row, k] >= 0:
                counts[slots[row, k]] += 1
    room = -(-counts.max() // _BLOCK) * _BLOCK
    x_of = np.zeros((room, hidden), np.float32)
    h_of = np.zeros((room, intermediate), np.float32)
    rows_of = np.zeros(room, np.int64)
    weights_of = np.zeros(room, np.float32)
    for slot in range(num_slots):
        if counts[slot] == 0:
            continue
        n = 0
        for row in range(num_rows):
            for k in range(top_k):
                if slots[row, k] == slot:
                    rows_of[n] = row
                    weights_of[n] = weights[row, k]
                    x_of[n] = x[row]
                    n += 1
        end = -(-n // _BLOCK) * _BLOCK
        for padding in range(n, end):
            weights_of[padding] = 0
        _gate_up(x_of, gate_up[slot], weights_of, h_of, end)
        _down(h_of, down[slot], rows_of, y, n, end)


def _gate_up_source(x: Any, gate_up: Any, weights: Any, h: Any, end: Any) -> None:
    """`h = weight · silu(gate(x)) · up(x)`, four rows at a time."""
    hidden, intermediate = x.shape[1], h.shape[1]
    for column in range(intermediate):
        gate_row, up_row = gate_up[column], gate_up[intermediate + column]
        for row in range(0, end, _BLOCK):
            x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[row + 3]
            g0 = g1 = g2 = g3 = u0 = u1 = u2 = u3 = np.float32(0)
            for i in range(hidden):
                g, u = gate_row[i], up_row[i]
                g0 += g * x0[i]
                g1 += g * x1[i]
                g2 += g * x2[i]
                g3 += g * x3[i]
                u0 += u * x0[i]
                u1 += u * x1[i]
                u2 += u * x2[i]
                u3 += u * x3[i]
            h[row, column] = g0 / (np.float32(1) + np.float32(math.exp(-g0))) * u0 * weights[row]
            h[row + 1, column] = g1 / (np.float32(1) + np.float32(math.exp(-g1))) * u1 * weights[row + 1]
            h[row + 2, column] = g2 / (np.float32(1) + np.float32(math.exp(-g2))) * u2 * weights[row + 2]
            h[row + 3, column] = g3 / (np.float32(1) + np.float32(math.exp(-g3))) * u3 * weights[row + 3]


def _down_source(h: Any, down: Any, rows: Any, y: Any, n: Any, end: Any) -> None:
    """`y[rows] += down(h)`, four rows and two columns at a time; `hidden` is even."""
    hidden, intermediate = down.shape
    for column in range(0, hidden, 2):
        first, second = down[column], down[column + 1]
        for row in range(0, end, _BLOCK):
            h0, h1, h2, h3 = h[row], h[row + 1], h[row + 2], h[row + 3]
            a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
            for i in range(intermediate):
                a, b = first[i], second[i]
                a0 += a * h0[i]
                a1 += a * h1[i]
                a2 += a * h2[i]
                a3 += a * h3[i]
                b0 += b * h0[i]
                b1 += b * h1[i]
                b2 += b * h2[i]
                b3 += b * h3[i]
            y[rows[row], column] += a0
            y[rows[row], column + 1] += b0
            if row + 1 < n:
                y[rows[row + 1], column] += a1
                y[rows[row + 1], column + 1] += b1
            if row + 2 < n:
                y[rows[row + 2], column] += a2
                y[rows[row + 2], column + 1] += b2
            if row + 3 < n:
                y[rows[row + 3], column] += a3
                y[rows[row + 3], column + 1] += b3


_compile: Any = numba.njit(fastmath=_REORDER, nogil=True, cache=True)
_gate_up: Any = _compile(_gate_up_source)
_down: Any = _compile(_down_source)
_grouped: Any = _compile(_grouped_source)
