"""Rows into frames and sums out of them, on a CPU: one compiled call for each shard and direction.

Frames are arrays of 32-bit words here: rows of any dtype are copied as such, and what is fp32 is added as such.

Shapes: `T` tokens, `U` rows of a frame, `W` words per row, `K` experts per token, `H` hidden.
"""

from __future__ import annotations

from typing import Any

from model.tiles_cpu import declare


@declare("void(i4[:,::1], i8[::1], i4[:,::1], f4[:,::1], i4[::1], f4[::1])")  # type: ignore[untyped-decorator]
def write_rows(x: Any, rows: Any, slots: Any, weights: Any, payload: Any, numbers: Any) -> None:
    """The payload of a call.

    Args:
        x: `[T, W]`.
        rows: `[U]`, which of `x` are sent.
        slots: `[U, K]`, likewise `weights`.
        payload: written; `numbers` is the same memory as fp32.
    """
    num_rows, width, top_k = len(rows), x.shape[1], slots.shape[1]
    slots_at, weights_at = num_rows * width, num_rows * (width + top_k)
    for u in range(num_rows):
        row = rows[u]
        for i in range(width):
            payload[u * width + i] = x[row, i]
        for k in range(top_k):
            payload[slots_at + u * top_k + k] = slots[u, k]
            numbers[weights_at + u * top_k + k] = weights[u, k]


@declare("void(f4[::1], i8[::1], f4[:,::1])")  # type: ignore[untyped-decorator]
def add_rows(payload: Any, rows: Any, y: Any) -> None:
    """Add an fp32 reply to the tokens it is for.

    Args:
        payload: `[U · H]` and more.
        rows: `[U]`.
        y: `[T, H]`.
    """
    hidden = y.shape[1]
    for u in range(len(rows)):
        for i in range(hidden):
            y[rows[u], i] += payload[u * hidden + i]
