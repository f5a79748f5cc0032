"""The attention layer's small operations on an fp32 CPU, each as one compiled loop.

A decode step has few rows, and in torch its norms, rotations, cache writes and gathers cost more in operator overhead
and copies than in arithmetic. Compiled by numba at the first use and cached on disk.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `D` head dim, `R` rotated dims, `B` single-token
sequences, `P` pages of a sequence, `G` tokens per page.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from model.linear import PANEL
from model.rows_cpu import DOTS, copy_row, dots, exponentials, largest_of, rotate, scale_row, sum_of_squares
from model.tiles_cpu import COLUMNS, MAX_ROWS, multiply
from model.vectors_cpu import address, compiled, declare, fetch, inner, reordered


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
    """`[T, H]`, normalised over the last dim."""
    out_TH = torch.empty_like(x_TH)
    norm_rows(x_TH.contiguous().numpy(), weight_H.numpy(), np.float32(eps), out_TH.numpy(), 0, len(x_TH))
    return out_TH


def decode_attention(
    q_BQD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    pages_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """One query per sequence over its pages, `[B, Q, D]`. The caches are `[slots, N, D]`."""
    out_BQD = torch.empty_like(q_BQD)
    _decode_attention(
        q_BQD.numpy(),
        k_cache.numpy(),
        v_cache.numpy(),
        pages_BP.numpy(),
        lengths_B.numpy(),
        page_size,
        np.float32(scale),
        out_BQD.numpy(),
    )
    return out_BQD


def warm_up() -> None:
    """Compile what has no declared signature, or load what was compiled before, so that no request waits for it."""
    x = torch.ones(1, 4)
    rms_norm(x, x[0], 1e-5)


@inner  # type: ignore[untyped-decorator]
def norm_rows(x: Any, weight: Any, eps: Any, out: Any, first: Any, last: Any) -> None:
    """RMSNorm of the rows `first … last - 1`."""
    hidden = x.shape[1]
    for row in range(first, last):
        factor = _norm_factor(address(x, row * hidden), hidden, eps)
        scale_row(address(x, row * hidden), factor, address(weight, 0), hidden, address(out, row * hidden))


@inner  # type: ignore[untyped-decorator]
def _norm_factor(x: Any, size: Any, eps: Any) -> Any:
    return np.float32(1) / np.sqrt(sum_of_squares(x, size) / np.float32(size) + eps)


@inner  # type: ignore[untyped-decorator]
def _norm_rotate(x: Any, dim: Any, weight: Any, eps: Any, cos: Any, sin: Any, rotated: Any, out: Any) -> None:
    """One head: RMSNorm (if it has a weight), then half-rotation of the first `rotated` dims."""
    if weight.shape[0] > 0:
        scale_row(x, _norm_factor(x, dim, eps), address(weight, 0), dim, out)
    else:
        copy_row(x, dim, out)
    rotate(out, cos, sin, rotated // 2)


@inner  # type: ignore[untyped-decorator]
def prepare_rows(
    qkv: Any,
    q_norm: Any,
    k_norm: Any,
    eps: Any,
    cos: Any,
    sin: Any,
    slots: Any,
    k_cache: Any,
    v_cache: Any,
    q: Any,
    first: Any,
    last: Any,
) -> None:
    """Normalise and rotate queries and keys, write keys and values to their slots, of the tokens `first … last - 1`.

    Args:
        qkv: `[T, Q + 2N, D]`.
        q_norm: `[D]`, or empty where the model has none; likewise `k_norm`.
        cos: `[T, R]`, likewise `sin`.
        slots: `[T]`, of the cache `[slots, N, D]`.
        q: `[T, Q, D]`, written.
    """
    num_q, num_kv, dim, rotated = q.shape[1], k_cache.shape[1], q.shape[2], cos.shape[1]
    for token in range(first, last):
        c, s = address(cos, token * rotated), address(sin, token * rotated)
        row, at_q, at_kv = token * qkv.shape[1] * dim, token * num_q * dim, slots[token] * num_kv * dim
        for head in range(num_q):
            x = address(qkv, row + head * dim)
            _norm_rotate(x, dim, q_norm, eps, c, s, rotated, address(q, at_q + head * dim))
        for head in range(num_kv):
            k, v = address(qkv, row + (num_q + head) * dim), address(qkv, row + (num_q + num_kv + head) * dim)
            _norm_rotate(k, dim, k_norm, eps, c, s, rotated, address(k_cache, at_kv + head * dim))
            copy_row(v, dim, address(v_cache, at_kv + head * dim))


@reordered  # type: ignore[untyped-decorator]
def _softmax(x: Any) -> None:
    """In place."""
    size = x.shape[0]
    factor = np.float32(1) / exponentials(address(x, 0), size, largest_of(address(x, 0), size, x[0]))
    for i in range(size):
        x[i] *= factor


@compiled  # type: ignore[untyped-decorator]
def attend_heads(
    b: Any,
    first: Any,
    last: Any,
    q: Any,
    k_cache: Any,
    v_cache: Any,
    pages: Any,
    length: Any,
    page_size: Any,
    scale: Any,
    out: Any,
) -> None:
    """One sequence, by the KV heads `first … last - 1`.

    Heads are the inner loops: the cache is read once from front to back, which the memory answers best.

    Args:
        q: `[B, Q, D]`, of which row `b` is read; `out` likewise.
        pages: `[P]`
    """
    num_q, num_kv, dim = q.shape[1], k_cache.shape[1], k_cache.shape[2]
    group, stride = num_q // num_kv, num_kv * dim
    room = -(-length // DOTS) * DOTS
    slots, scores = np.empty(room, np.int64), np.empty((num_q, room), np.float32)
    # Scores are computed several at a time; those behind the end repeat the last one, and nobody reads them.
    for s in range(room):
        position = min(s, length - 1)
        slots[s] = (pages[position // page_size] * page_size + position % page_size) * stride
    for s in range(0, length, DOTS):
        following = min(s + page_size, length - 1)
        for n in range(first, last):
            for t in range(following, min(following + DOTS, length)):
                for i in range(0, dim, PANEL):
                    fetch(address(k_cache, slots[t] + n * dim + i))
            for head in range(n * group, (n + 1) * group):
                x, out_of = address(q, (b * num_q + head) * dim), address(scores, head * room + s)
                dots(x, address(k_cache, n * dim), slots, s, dim, scale, out_of)
    for head in range(first * group, last * group):
        _softmax(scores[head, :length])
    # A page's positions are apart by the same distance, so that a tile runs over all of them.
    for start in range(0, length, page_size):
        size, following = min(page_size, length - start), slots[min(start + page_size, length - 1)]
        for n in range(first, last):
            for column in range(0, dim, COLUMNS):
                v = address(v_cache, slots[start] + n * dim + column)
                for head in range(n * group, (n + 1) * group, MAX_ROWS):
                    multiply(
                        min(MAX_ROWS, (n + 1) * group - head),
                        min(COLUMNS, dim - column),
                        size,
                        address(scores, head * room + start),
                        room,
                        v,
                        stride,
                        PANEL,
                        address(out, (b * num_q + head) * dim + column),
                        dim,
                        min(start, 1),
                        address(v_cache, following + n * dim + column),
                        stride,
                    )


@declare(  # type: ignore[untyped-decorator]
    "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], i8[:,::1], i8[::1], i8, f4, f4[:,:,::1])"
)
def _decode_attention(
    q: Any, k_cache: Any, v_cache: Any, pages: Any, lengths: Any, page_size: Any, scale: Any, out: Any
) -> None:
    for b in range(q.shape[0]):
        attend_heads(b, 0, k_cache.shape[1], q, k_cache, v_cache, pages[b], lengths[b], page_size, scale, out)
