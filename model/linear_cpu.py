"""Linear layers on an fp32 CPU, over weights packed in panels.

A panel holds sixteen rows of a weight matrix `[C, H]` transposed, `[H, 16]`, so that a tile reads it from front to back
for six rows of input. With few rows, which is what decoding has, this runs near the memory's rate, two to four times as
fast as a library's GEMM, which packs the same weights anew at every call; with many it is no slower.

Signatures are declared, so that an array of another layout is refused: addresses are computed from its first element.

Shapes: `T` rows, `H` inputs, `C` columns (outputs), `I` intermediate.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from model.tiles_cpu import MAX_ROWS, PANEL, address, advance, declare, multiply, power_of_two

_compile: Any = numba.njit(nogil=True, cache=True)
# Sums may be reordered, which is what vectorising them takes; NaN and infinity keep their meaning.
_compile_reordered: Any = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})

_DEPTH = 512
"""Inputs per pass: a panel's part of so many, 32 KiB, and six rows of input stay near the core."""

_ROWS = 32 * MAX_ROWS
"""Rows per pass over the weights: their inputs stay in the second-level cache."""

_AHEAD = 1024
"""Elements, 4 KiB: far enough for the memory to answer."""


@_compile_reordered  # type: ignore[untyped-decorator]
def exp(x: Any) -> Any:
    """Cephes' `expf` (2 ulp) for arguments up to 88, written so that a loop over it vectorises; 0 below -87."""
    # Below this the result underflows; NaN fails the comparison and stays.
    y = np.float32(-87) if x < np.float32(-87) else x
    n = np.floor(y * np.float32(1.44269504) + np.float32(0.5))
    r = y - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + np.float32(1)) * power_of_two(n)


@_compile_reordered  # type: ignore[untyped-decorator]
def silu_product(gate: Any, up: Any, out: Any) -> None:
    for i in range(out.shape[0]):
        # exp(-87) is 0 beside 1, and exp(87) is infinite enough: both ends keep their limit.
        out[i] = gate[i] / (np.float32(1) + exp(min(-gate[i], np.float32(87)))) * up[i]


@_compile  # type: ignore[untyped-decorator]
def linear_rows(x: Any, panels: Any, bias: Any, out: Any) -> None:
    num_rows, depth = x.shape
    columns = out.shape[1]
    num_blocks = -(-num_rows // MAX_ROWS)
    add = 0
    if bias.shape[0] > 0:
        add = 1
        for row in range(num_rows):
            out[row] = bias
    for start in range(0, depth, _DEPTH):
        size = min(_DEPTH, depth - start)
        for p in range(panels.shape[0]):
            panel = address(panels, (p * depth + start) * PANEL)
            # While a panel is computed, each of its blocks of rows fetches a part of the next one; a single block runs
            # through it so fast that it fetches what it needs itself in a moment.
            following = advance(panel, depth * PANEL if num_blocks > 1 else _AHEAD)
            step = max(PANEL // num_blocks, 1)
            for block in range(num_blocks):
                row, end = block * num_rows // num_blocks, (block + 1) * num_rows // num_blocks
                multiply(
                    end - row,
                    address(x, row * depth + start),
                    depth,
                    panel,
                    PANEL,
                    size,
                    address(out, row * columns + p * PANEL),
                    columns,
                    min(PANEL, columns - p * PANEL),
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


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], f4[:,:,::1], f4[::1], f4[:,::1])"
)
def linear(x: Any, panels: Any, bias: Any, out: Any) -> None:
    """`out = x · Wᵀ + bias`.

    Args:
        x: `[T, H]`.
        panels: `[ceil(C / 16), H, 16]`.
        bias: `[C]`, or empty for none.
        out: `[T, C]`.
    """
    for first in range(0, x.shape[0], _ROWS):
        last = min(first + _ROWS, x.shape[0])
        linear_rows(x[first:last], panels, bias, out[first:last])


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1])"
)
def swiglu(x: Any, gate_up: Any, down: Any, out: Any) -> None:
    """`out = down(silu(gate(x)) · up(x))`.

    Args:
        x: `[T, H]`.
        gate_up: `[2 · ceil(I / 16), H, 16]`, the gate's panels first.
        down: `[ceil(H / 16), I, 16]`.
        out: `[T, H]`.
    """
    num_rows, half = min(x.shape[0], _ROWS), gate_up.shape[0] // 2 * PANEL
    no_bias = np.empty(0, np.float32)
    h = np.empty((num_rows, 2 * half), np.float32)
    activated = np.empty((num_rows, down.shape[1]), np.float32)
    for first in range(0, x.shape[0], _ROWS):
        n = min(_ROWS, x.shape[0] - first)
        linear_rows(x[first : first + n], gate_up, no_bias, h[:n])
        for row in range(n):
            silu_product(h[row, :half], h[row, half:], activated[row])
        linear_rows(activated[:n], down, no_bias, out[first : first + n])
