"""Decode attention over pages on a GPU: keys and values are read once, where they lie.

Sequences are divided among programs not by one but by pieces of their positions, so that a few long ones keep the whole
device at work, and the pieces' results are put together by how much each of them weighs (flash-decoding, Dao et al.,
2023). The query heads of a KV head are rows of one product. Nothing depends on the host but the shapes: lengths and
pages are read on the device, so that a captured graph serves whatever sequences there are.

Shapes: `B` sequences, `Q` and `N` query and KV heads, `G = Q / N`, `D` head dim, `P` pages, `C` pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 64
"""Positions that a program looks at together."""
_LEAST_PIECE = 256
"""Positions below which dividing costs more than it brings."""
_MOST_PIECES = 64
_PROGRAMS_PER_PROCESSOR = 4
"""That run there at the same time, by the registers that they take."""


def decode_attention(
    q_BQD: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pages_BP: torch.Tensor,
    lengths_B: torch.Tensor,
    page_size: int,
    scale: float,
) -> torch.Tensor:
    """One query per sequence, `[B, Q, D]`; zeros where the length is 0.

    Args:
        k: the layer's keys by flat slot, `[P · page_size, N, D]`.
        pages_BP: page tables, contiguous along P; what lies behind a sequence's length is not read.
    """
    num_sequences, num_q, head_dim = q_BQD.shape
    num_kv = k.shape[1]
    group = num_q // num_kv
    pieces = num_pieces(num_sequences * num_kv, pages_BP.shape[1] * page_size, q_BQD.device)
    out_BQD = torch.empty_like(q_BQD)
    parts = torch.empty((num_sequences, num_q, pieces, head_dim), dtype=torch.float32, device=q_BQD.device)
    log_sums = torch.empty((num_sequences, num_q, pieces), dtype=torch.float32, device=q_BQD.device)
    dims = triton.next_power_of_2(head_dim)
    _attend[(num_kv, pieces, num_sequences)](
        q_BQD,
        k,
        v,
        pages_BP,
        lengths_B,
        parts,
        log_sums,
        out_BQD,
        pages_BP.stride(0),
        q_BQD.stride(0),
        scale,
        HEADS=num_kv,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        DIMS=max(16, dims),
        PAGE=page_size,
        BLOCK=_BLOCK,
        PIECES=pieces,
        num_warps=4,
        num_stages=3 if q_BQD.dtype != torch.float32 else 2,
    )
    if pieces > 1:
        _merge[(num_q, num_sequences)](
            parts,
            log_sums,
            out_BQD,
            HEAD_DIM=head_dim,
            DIMS=dims,
            PIECES=pieces,
            ROOM=triton.next_power_of_2(pieces),
            num_warps=4,
        )
    return out_BQD


def num_pieces(num_spans: int, capacity: int, device: torch.device) -> int:
    """Pieces of each of so many spans of at most `capacity` positions: as few as leave hardly a processor idle.

    Programs come in waves, and a last wave that is nearly empty takes as long as a full one.
    """
    processors = 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
    wave = processors * _PROGRAMS_PER_PROCESSOR

    def used(pieces: int) -> float:
        return num_spans * pieces / (-(-num_spans * pieces // wave) * wave)

    most = max(1, min(-(-capacity // _LEAST_PIECE), _MOST_PIECES))
    return next((pieces for pieces in range(1, most + 1) if used(pieces) >= 0.9), max(range(1, most + 1), key=used))


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    pages_ptr,
    lengths_ptr,
    parts_ptr,
    log_sums_ptr,
    out_ptr,
    pages_stride,
    q_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
):
    """One KV head of one sequence, over one piece of its positions."""
    head, piece, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + sequence).to(tl.int32)
    each = tl.cdiv(tl.cdiv(length, PIECES), BLOCK) * BLOCK
    begin = piece * each
    end = tl.minimum(begin + each, length)
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    q_mask = (row < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
    q_head = head * GROUP + row
    q = tl.load(
        q_ptr + sequence.to(tl.int64) * q_stride + q_head[:, None] * HEAD_DIM + dim[None, :], mask=q_mask, other=0.0
    )
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DIMS), tl.float32)
    # To the base of two, which is what the device computes.
    scale_2 = scale * 1.4426950408889634
    for first in range(begin, end, BLOCK):
        position = first + tl.arange(0, BLOCK)
        there = position < end
        page = tl.load(pages_ptr + sequence.to(tl.int64) * pages_stride + position // PAGE, mask=there, other=0)
        slot = page.to(tl.int64) * PAGE + position % PAGE
        offset = (slot[:, None] * HEADS + head) * HEAD_DIM + dim[None, :]
        mask = there[:, None] & (dim < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + offset, mask=mask, other=0.0)
        v = tl.load(v_ptr + offset, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * scale_2
        scores = tl.where(there[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(best - higher)
        total = total * fade + tl.sum(weights, 1)
        out = tl.dot(weights.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
        best = higher
    # Where nothing was looked at there is nothing to divide by.
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    if PIECES == 1:
        at = out_ptr + (sequence.to(tl.int64) * HEADS * GROUP + q_head[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=q_mask)
    else:
        place = (sequence.to(tl.int64) * HEADS * GROUP + q_head) * PIECES + piece
        tl.store(parts_ptr + place[:, None] * HEAD_DIM + dim[None, :], out, mask=q_mask)
        log_sum = tl.where(total > 0, best + tl.log2(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(log_sums_ptr + place, log_sum, mask=row < GROUP)


@triton.jit
def _merge(
    parts_ptr,
    log_sums_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PIECES: tl.constexpr,
    ROOM: tl.constexpr,
):
    """One query head's pieces, put together."""
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    piece, dim = tl.arange(0, ROOM), tl.arange(0, DIMS)
    log_sums = tl.load(log_sums_ptr + place * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    best = tl.max(log_sums, 0)
    # A sequence of no positions has no piece that weighs anything.
    weights = tl.where(log_sums > float("-inf"), tl.exp2(log_sums - tl.where(best > float("-inf"), best, 0.0)), 0.0)
    mask = (piece < PIECES)[:, None] & (dim < HEAD_DIM)[None, :]
    parts = tl.load(parts_ptr + (place * PIECES + piece[:, None]) * HEAD_DIM + dim[None, :], mask=mask, other=0.0)
    total = tl.sum(weights, 0)
    out = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + place * HEAD_DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)
