"""Linear layers on an fp32 CPU, over weights packed in panels.

A panel holds sixteen rows of a weight matrix `[C, H]` transposed, `[H, 16]`, so that a tile reads it from front to back
for several rows of input. With few rows, which is what decoding has, this is two to three times as fast as a library's
GEMM, which packs the same weights anew at every call; with many it is no slower (`octet bench linear`).

Signatures are declared, so that an array of another layout is refused: addresses are computed from its first element.

Shapes: `T` rows, `H` inputs, `C` columns (outputs), `I` intermediate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.linear import PANEL
from model.rows_cpu import copy_row, exp
from model.tiles_cpu import COLUMNS, MAX_ROWS, multiply
from model.vectors_cpu import address, advance, declare, inner, reordered

_DEPTH = 512
"""Inputs per pass: a tile's part of so many, 32 or 64 KiB of weights, and its rows of input stay near the core."""

ROWS = 192
"""Rows per pass over the weights: their inputs stay in the second-level cache."""

_AHEAD = 1024
"""Elements, 4 KiB: far enough for the memory to answer."""


@inner  # type: ignore[untyped-decorator]
def linear_rows(x: Any, panels: Any, bias: Any, out: Any, first: Any, last: Any) -> None:
    num_rows, depth = x.shape
    columns = out.shape[1]
    num_blocks = -(-num_rows // MAX_ROWS)
    begin, end = first * PANEL, min(last * PANEL, columns)
    add = 0
    if bias.shape[0] > 0:
        add = 1
        for row in range(num_rows):
            copy_row(address(bias, begin), end - begin, address(out, row * columns + begin))
    for start in range(0, depth, _DEPTH):
        size = min(_DEPTH, depth - start)
        for p in range(first, last, COLUMNS // PANEL):
            panel = address(panels, (p * depth + start) * PANEL)
            # While a tile is computed, each of its blocks of rows fetches a part of the next one; a single block runs
            # through it so fast that it fetches what it needs itself in a moment.
            following = advance(panel, depth * COLUMNS if num_blocks > 1 else _AHEAD)
            step = -(-PANEL // num_blocks)
            for block in range(num_blocks):
                row, next_row = block * num_rows // num_blocks, (block + 1) * num_rows // num_blocks
                multiply(
                    next_row - row,
                    min(COLUMNS, end - p * PANEL),
                    size,
                    address(x, row * depth + start),
                    depth,
                    panel,
                    PANEL,
                    depth * PANEL,
                    address(out, row * columns + p * PANEL),
                    columns,
                    add,
                    advance(following, min(block * step, PANEL) * size),
                    step,
                )
        add = 1


@declare("void(f4[:,::1])")  # type: ignore[untyped-decorator]
def pack(weight: Any) -> None:
    """Turn `[C, H]` into what is `[C / 16, H, 16]` in place; `C` is a multiple of 16."""
    columns, depth = weight.shape
    flat = weight.reshape(columns * depth)
    panel = np.empty(PANEL * depth, weight.dtype)
    for first in range(0, columns * depth, PANEL * depth):
        panel[:] = flat[first : first + PANEL * depth]
        for i in range(depth):
            for j in range(PANEL):
                flat[first + i * PANEL + j] = panel[j * depth + i]


@declare("void(f4[:,::1], f4[:,:,::1], f4[::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def linear_panels(x: Any, panels: Any, bias: Any, out: Any, first: Any, last: Any) -> None:
    """The columns of `out = x · Wᵀ + bias` that the panels `first … last - 1` give.

    Args:
        x: `[T, H]`.
        panels: `[ceil(C / 16), H, 16]`.
        bias: `[C]`, or empty for none.
        out: `[T, C]`.
    """
    for start in range(0, x.shape[0], ROWS):
        stop = min(start + ROWS, x.shape[0])
        linear_rows(x[start:stop], panels, bias, out[start:stop], first, last)


@reordered  # type: ignore[untyped-decorator]
def silu_product(gate: Any, up: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        # exp(-87) is 0 beside 1, and exp(87) is infinite enough: both ends keep their limit.
        out[i] = gate[i] / (np.float32(1) + exp(min(-gate[i], np.float32(87)))) * up[i]


@inner  # type: ignore[untyped-decorator]
def swiglu_rows(x: Any, gate_up: Any, down: Any, h: Any, activated: Any, out: Any) -> None:
    """`out = down(silu(gate(x)) · up(x))` for at most `ROWS` rows.

    Args:
        x: `[T, H]`.
        gate_up: `[2 · ceil(I / 16), H, 16]`, the gate's panels first.
        down: `[ceil(H / 16), I, 16]`.
        h: room for `[T, 2 · ceil(I / 16) · 16]`.
        activated: room for `[T, I]`.
        out: `[T, H]`.
    """
    num_rows, half, no_bias = x.shape[0], h.shape[1] // 2, h[0, :0]
    linear_rows(x, gate_up, no_bias, h[:num_rows], 0, len(gate_up))
    for row in range(num_rows):
        silu_product(h[row, :half], h[row, half:], activated[row])
    linear_rows(activated[:num_rows], down, no_bias, out, 0, len(down))


@declare("void(f4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1])")  # type: ignore[untyped-decorator]
def swiglu(x: Any, gate_up: Any, down: Any, out: Any) -> None:
    """As `swiglu_rows`, for any number of rows."""
    room = min(x.shape[0], ROWS)
    h = np.empty((room, len(gate_up) * PANEL), np.float32)
    activated = np.empty((room, down.shape[1]), np.float32)
    for start in range(0, x.shape[0], ROWS):
        stop = min(start + ROWS, x.shape[0])
        swiglu_rows(x[start:stop], gate_up, down, h, activated, out[start:stop])
