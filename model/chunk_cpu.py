"""A decoder layer before and after its attention on an fp32 CPU, for prompts: two compiled calls over blocks of rows.

Rows are independent of each other there, so that threads take blocks of them, and what a block needs between two
products stays near the core. The loops are those of `model.linear_cpu` and `model.fused_cpu`, in the same order: rows
come out the same, bit for bit, as when they are computed there.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `D` head dim, `R` rotated dims.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.fused_cpu import norm_rows, prepare_rows
from model.linear_cpu import ROWS, linear_rows
from model.rows_cpu import add_row
from model.vectors_cpu import address, declare


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,::1], f4, f4[::1], f4[:,:,::1], f4[::1], f4[::1], f4[::1], f4[:,::1], f4[:,::1], i8[::1], "
    "f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i8, i8)"
)
def project(
    x: Any,
    eps: Any,
    norm: Any,
    qkv: Any,
    qkv_bias: Any,
    q_norm: Any,
    k_norm: Any,
    cos: Any,
    sin: Any,
    kv_slots: Any,
    k_cache: Any,
    v_cache: Any,
    q: Any,
    first: Any,
    last: Any,
) -> None:
    """Queries, and keys and values in the cache, of the rows `first … last - 1`.

    Args:
        x: `[T, H]`.
        qkv: panels of `[(Q + 2N) · D, H]`; `qkv_bias`, `q_norm` and `k_norm` may be empty.
        cos: `[T, R]`, likewise `sin`.
        kv_slots: `[T]`, where the cache `[slots, N, D]` is written.
        q: `[T, Q, D]`, written.
    """
    hidden, num_heads, dim = x.shape[1], q.shape[1] + 2 * k_cache.shape[1], q.shape[2]
    room = min(last - first, ROWS)
    h, heads = np.empty((room, hidden), np.float32), np.empty((room, num_heads, dim), np.float32)
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        n = stop - start
        norm_rows(x[start:stop], norm, eps, h, 0, n)
        linear_rows(h[:n], qkv, qkv_bias, heads[:n].reshape(n, num_heads * dim), 0, len(qkv))
        prepare_rows(
            heads,
            q_norm,
            k_norm,
            eps,
            cos[start:stop],
            sin[start:stop],
            kv_slots[start:stop],
            k_cache,
            v_cache,
            q[start:stop],
            0,
            n,
        )


@declare("void(f4[:,::1], f4[:,:,::1], f4[:,::1], f4, f4[::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def close(attended: Any, o: Any, x: Any, eps: Any, norm: Any, h: Any, first: Any, last: Any) -> None:
    """`x += o(attended)`, and `h = norm(x)` of that, for the rows `first … last - 1`.

    Args:
        attended: `[T, Q · D]`.
        o: panels of `[H, Q · D]`.
        x: `[T, H]`, likewise `h`.
    """
    hidden, no_bias = x.shape[1], norm[:0]
    delta = np.empty((min(last - first, ROWS), hidden), np.float32)
    for start in range(first, last, ROWS):
        stop = min(start + ROWS, last)
        linear_rows(attended[start:stop], o, no_bias, delta[: stop - start], 0, len(o))
        for row in range(start, stop):
            add_row(address(delta, (row - start) * hidden), hidden, address(x, row * hidden))
        norm_rows(x, norm, eps, h, start, stop)
