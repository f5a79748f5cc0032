"""A decoder layer on an fp32 CPU as three compiled calls, for batches whose tokens attend one by one: decode steps.

What a layer computes before its experts is one call (`attend`): norm, projections, rotation, cache, attention, output
projection, residual, norm. The dense feed-forward is another, and so is the output head. Each is shared by a `Team`.
Between calls there is nothing but Python of a few lines: its working set has been pushed out of the caches by weights,
so that every operator of a library costs tens of microseconds there.

The loops are those of `model.linear_cpu` and `model.fused_cpu`, in the same order: rows come out the same, bit for
bit, as when they are computed there.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `D` head dim, `I` intermediate, `R` rotated dims,
`P` pages of a sequence, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.fused_cpu import attend_heads, norm_rows, prepare_rows
from model.linear import PANEL
from model.linear_cpu import ROWS, linear_rows, silu_product
from model.team_cpu import done, enter, leave, note, take, wait
from model.vectors_cpu import declare, inner

_ROW_BLOCK = 8
"""Rows of a block of cheap work."""
_PANEL_BYTES = 2**17
"""Weights of a block of panels: some ten microseconds."""
ATTEND_STAGES = ("norm", "linear", "cache", "attention", "linear", "norm")
"""What the stages of `attend` are."""
_SPLIT_HEADS_BELOW = 4
"""So few tokens are divided by their KV heads."""


@inner  # type: ignore[untyped-decorator]
def _share_linear(state: Any, stage: Any, x: Any, panels: Any, bias: Any, out: Any) -> None:
    """One stage: blocks of panels."""
    step = max(1, _PANEL_BYTES // (panels.shape[1] * PANEL * 4))
    num_blocks = -(-len(panels) // step)
    block = take(state, stage)
    while block < num_blocks:
        for start in range(0, x.shape[0], ROWS):
            stop = min(start + ROWS, x.shape[0])
            first, last = block * step, min((block + 1) * step, len(panels))
            linear_rows(x[start:stop], panels, bias, out[start:stop], first, last)
        block = done(state, stage)
    wait(state, stage, num_blocks)


@inner  # type: ignore[untyped-decorator]
def _share_sum_and_norm(state: Any, stage: Any, x: Any, delta: Any, weight: Any, eps: Any, h: Any) -> None:
    """One stage: `x += delta`, then its norm, by rows. An empty `delta` adds nothing."""
    num_blocks = -(-x.shape[0] // _ROW_BLOCK)
    block = take(state, stage)
    while block < num_blocks:
        first, last = block * _ROW_BLOCK, min((block + 1) * _ROW_BLOCK, x.shape[0])
        if delta.shape[0] > 0:
            for row in range(first, last):
                for i in range(x.shape[1]):
                    x[row, i] += delta[row, i]
        norm_rows(x, weight, eps, h, first, last)
        block = done(state, stage)
    wait(state, stage, num_blocks)


@declare(  # type: ignore[untyped-decorator]
    "void(i8[::1], i8, i8, f4[:,::1], f4, f4[::1], f4[:,:,::1], f4[::1], f4[::1], f4[::1], f4[:,:,::1], f4[::1], "
    "f4[:,::1], f4[:,::1], i8[::1], f4[:,:,::1], f4[:,:,::1], i8[:,::1], i8[::1], i8, f4, "
    "f4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1])"
)
def attend(
    state: Any,
    turn: Any,
    leads: Any,
    x: Any,
    eps: Any,
    input_norm: Any,
    qkv: Any,
    qkv_bias: Any,
    q_norm: Any,
    k_norm: Any,
    o: Any,
    output_norm: Any,
    cos: Any,
    sin: Any,
    kv_slots: Any,
    k_cache: Any,
    v_cache: Any,
    pages: Any,
    lengths: Any,
    page_size: Any,
    scale: Any,
    h: Any,
    qkv_out: Any,
    heads: Any,
    delta: Any,
) -> None:
    """`x += attention(norm(x))`, and `h = norm(x)` of that.

    Args:
        x: `[T, H]`.
        qkv: panels of `[(Q + 2N) · D, H]`; `qkv_bias`, `q_norm` and `k_norm` may be empty.
        o: panels of `[H, Q · D]`.
        cos: `[T, R]`, likewise `sin`.
        kv_slots: `[T]`, where the cache `[slots, N, D]` is written.
        pages: `[T, P]`.
        lengths: `[T]`, positions that a token attends to, its own included.
        h: `[T, H]`.
        qkv_out: room for `[T, Q + 2N, D]`.
        heads: room for `[2, T, Q · D]`.
        delta: room for `[T, H]`.
    """
    if not enter(state, turn, leads):
        return
    num_tokens, num_kv, dim = x.shape[0], k_cache.shape[1], k_cache.shape[2]
    num_q = qkv_out.shape[1] - 2 * num_kv
    q, out = heads[0].reshape(num_tokens, num_q, dim), heads[1].reshape(num_tokens, num_q, dim)
    nothing = np.empty((0, 0), np.float32)
    _share_sum_and_norm(state, 0, x, nothing, input_norm, eps, h)
    note(state, 0, leads)
    _share_linear(state, 1, h, qkv, qkv_bias, qkv_out.reshape(num_tokens, qkv_out.shape[1] * dim))
    note(state, 1, leads)
    num_blocks = -(-num_tokens // _ROW_BLOCK)
    block = take(state, 2)
    while block < num_blocks:
        first, last = block * _ROW_BLOCK, min((block + 1) * _ROW_BLOCK, num_tokens)
        prepare_rows(qkv_out, q_norm, k_norm, eps, cos, sin, kv_slots, k_cache, v_cache, q, first, last)
        block = done(state, 2)
    wait(state, 2, num_blocks)
    note(state, 2, leads)
    parts = num_kv if num_tokens < _SPLIT_HEADS_BELOW else 1
    block = take(state, 3)
    while block < num_tokens * parts:
        token, part = block // parts, block % parts
        first, last = part * num_kv // parts, (part + 1) * num_kv // parts
        attend_heads(token, first, last, q, k_cache, v_cache, pages[token], lengths[token], page_size, scale, out)
        block = done(state, 3)
    wait(state, 3, num_tokens * parts)
    note(state, 3, leads)
    _share_linear(state, 4, heads[1], o, np.empty(0, np.float32), delta)
    note(state, 4, leads)
    _share_sum_and_norm(state, 5, x, delta, output_norm, eps, h)
    note(state, 5, leads)
    leave(state, leads)


@declare(  # type: ignore[untyped-decorator]
    "void(i8[::1], i8, i8, f4[:,::1], f4[:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,::1], f4[:,::1])"
)
def feed_forward(
    state: Any,
    turn: Any,
    leads: Any,
    x: Any,
    h: Any,
    gate_up: Any,
    down: Any,
    gate_up_out: Any,
    activated: Any,
    delta: Any,
) -> None:
    """`x += down(silu(gate(h)) · up(h))`.

    Args:
        x: `[T, H]`, likewise `h`.
        gate_up: `[2 · ceil(I / 16), H, 16]`, the gate's panels first.
        down: `[ceil(H / 16), I, 16]`.
        gate_up_out: room for `[T, 2 · ceil(I / 16) · 16]`.
        activated: room for `[T, I]`.
        delta: room for `[T, H]`.
    """
    if not enter(state, turn, leads):
        return
    num_tokens, half, no_bias = x.shape[0], gate_up_out.shape[1] // 2, np.empty(0, np.float32)
    _share_linear(state, 0, h, gate_up, no_bias, gate_up_out)
    block = take(state, 1)
    while block < num_tokens:
        silu_product(gate_up_out[block, :half], gate_up_out[block, half:], activated[block])
        block = done(state, 1)
    wait(state, 1, num_tokens)
    _share_linear(state, 2, activated, down, no_bias, delta)
    block = take(state, 3)
    while block < num_tokens:
        for i in range(x.shape[1]):
            x[block, i] += delta[block, i]
        block = done(state, 3)
    wait(state, 3, num_tokens)
    leave(state, leads)


@declare("void(i8[::1], i8, i8, f4[:,::1], f4[:,:,::1], f4[:,::1])")  # type: ignore[untyped-decorator]
def project(state: Any, turn: Any, leads: Any, x: Any, panels: Any, out: Any) -> None:
    """`out = x · Wᵀ`.

    Args:
        x: `[T, H]`.
        panels: `[ceil(V / 16), H, 16]`.
        out: `[T, V]`.
    """
    if not enter(state, turn, leads):
        return
    _share_linear(state, 0, x, panels, np.empty(0, np.float32), out)
    leave(state, leads)


@declare("void(f4[:,::1], f4[:,::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def add_experts(x: Any, routed: Any, shared: Any, first: Any, last: Any) -> None:
    """`x += routed + shared`, `[T, H]` each, in the rows `first … last - 1`."""
    for row in range(first, last):
        for i in range(x.shape[1]):
            x[row, i] += routed[row, i] + shared[row, i]
