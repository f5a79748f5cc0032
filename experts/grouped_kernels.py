"""The kernels of `experts.grouped_gpu`: cut pairs into tiles, multiply tile by tile, add up.

A program of a product looks its tile up in the table that `cut` wrote, and ends at once where there is none.
"""

import triton
import triton.language as tl


@triton.jit
def cut(
    sorted_ptr,
    num_pairs,
    holds_ptr,
    served_ptr,
    activated_ptr,
    tiles_ptr,
    num_tiles_ptr,
    poison_ptr,
    num_slots,
    most_tiles,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program: where each slot's pairs begin, and its tiles; the last has what is left."""
    slot = tl.arange(0, SLOTS)
    first = _lower_bound(sorted_ptr, num_pairs, slot, STEPS)
    last = _lower_bound(sorted_ptr, num_pairs, slot + 1, STEPS)
    there = slot < num_slots
    count = tl.where(there, last - first, 0)
    holds = tl.load(holds_ptr + slot, mask=there, other=0)
    # Pairs behind the last slot's ask for slots that are not there.
    beyond = num_pairs - tl.sum(tl.where(slot == num_slots - 1, last, 0))
    missing = tl.sum(((count > 0) & (holds == 0)).to(tl.int32)) + beyond
    tl.store(poison_ptr, tl.where(missing > 0, float("nan"), 0.0))
    served = tl.load(served_ptr + slot, mask=there, other=0)
    tl.store(served_ptr + slot, served + count, mask=there)
    tl.store(activated_ptr, tl.load(activated_ptr) + tl.sum((count > 0).to(tl.int64)))
    tiles = (count + ROWS - 1) // ROWS
    before = tl.cumsum(tiles, 0) - tiles
    for index in range(tl.max(tiles, 0)):
        at, used = tiles_ptr + before + index, index < tiles
        tl.store(at, slot, mask=used)
        tl.store(at + most_tiles, first + index * ROWS, mask=used)
        tl.store(at + 2 * most_tiles, tl.minimum(count - index * ROWS, ROWS), mask=used)
    tl.store(num_tiles_ptr, tl.sum(tiles, 0))


@triton.jit
def _lower_bound(sorted_ptr, size, values, STEPS: tl.constexpr):
    """How many of the sorted numbers are smaller than each value."""
    low = tl.zeros_like(values)
    high = low + size
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        smaller = tl.load(sorted_ptr + middle, mask=middle < high, other=0) < values
        open_ = low < high
        low = tl.where(open_ & smaller, middle + 1, low)
        high = tl.where(open_ & ~smaller, middle, high)
    return low


@triton.jit
def _weights(source, row, column, rows_end, columns, WEIGHTS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """`[WEIGHTS, DEPTH]` of a matrix, by the copy engine where `source` describes it, else by pointers."""
    if isinstance(source, tl.tensor):
        at_row, at_column = row + tl.arange(0, WEIGHTS), column + tl.arange(0, DEPTH)
        mask = (at_row < rows_end)[:, None]
        if not EVEN:
            mask = mask & (at_column < columns)[None, :]
        return tl.load(source + at_row[:, None].to(tl.int64) * columns + at_column[None, :], mask=mask, other=0.0)
    else:  # noqa: RET505 - what stands behind an `if` is compiled whether or not it is reached
        return source.load([row, column])


@triton.jit
def _tokens(pointers_T, column, mask_T, columns, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """`[DEPTH, tokens]`: a piece of some rows, turned."""
    at_column = column + tl.arange(0, DEPTH)
    mask = mask_T[:, None]
    if not EVEN:
        mask = mask & (at_column < columns)[None, :]
    return tl.load(pointers_T[:, None] + at_column[None, :], mask=mask, other=0.0).T


@triton.jit
def gate_up(
    x_ptr,
    order_ptr,
    w,
    h_ptr,
    tiles_ptr,
    num_tiles_ptr,
    most_tiles,
    hidden,
    intermediate,
    top_k,
    WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEWER: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`silu(gate(x)) · up(x)` of one tile's rows, for WEIGHTS of the intermediate columns."""
    num_blocks = tl.cdiv(intermediate, WEIGHTS)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if tile >= tl.load(num_tiles_ptr):
        return
    slot, first = tl.load(tiles_ptr + tile), tl.load(tiles_ptr + most_tiles + tile)
    rows = tl.load(tiles_ptr + 2 * most_tiles + tile)
    if FEWER < TOKENS and rows <= FEWER:
        _gate_up(
            x_ptr, order_ptr + first, w, h_ptr, slot, first, rows, block, hidden, intermediate, top_k,
            WEIGHTS, FEWER, DEPTH, EVEN,
        )  # fmt: skip
    else:
        _gate_up(
            x_ptr, order_ptr + first, w, h_ptr, slot, first, rows, block, hidden, intermediate, top_k,
            WEIGHTS, TOKENS, DEPTH, EVEN,
        )  # fmt: skip


@triton.jit
def _gate_up(
    x_ptr,
    order_ptr,
    w,
    h_ptr,
    slot,
    first,
    rows,
    block,
    hidden,
    intermediate,
    top_k,
    WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    gate_at = slot * 2 * intermediate + block * WEIGHTS
    up_at, end = gate_at + intermediate, (slot + 1) * 2 * intermediate
    token = tl.arange(0, TOKENS)
    there = token < rows
    source = x_ptr + (tl.load(order_ptr + token, mask=there, other=0) // top_k).to(tl.int64) * hidden
    gate = tl.zeros((WEIGHTS, TOKENS), tl.float32)
    up = tl.zeros((WEIGHTS, TOKENS), tl.float32)
    for k in range(0, hidden, DEPTH):
        g = _weights(w, gate_at, k, end, hidden, WEIGHTS, DEPTH, EVEN)
        u = _weights(w, up_at, k, end, hidden, WEIGHTS, DEPTH, EVEN)
        x = _tokens(source, k, there, hidden, DEPTH, EVEN)
        gate = tl.dot(g, x, gate, input_precision="ieee")
        up = tl.dot(u, x, up, input_precision="ieee")
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    # Rounded where torch's operators round.
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    h = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    column = block * WEIGHTS + tl.arange(0, WEIGHTS)
    at = h_ptr + (first + token)[None, :].to(tl.int64) * intermediate + column[:, None]
    tl.store(at, h.to(dtype), mask=(column < intermediate)[:, None] & there[None, :])


@triton.jit
def down(
    h_ptr,
    order_ptr,
    w,
    out_ptr,
    tiles_ptr,
    num_tiles_ptr,
    most_tiles,
    hidden,
    intermediate,
    WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    FEWER: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """`down(h)` of one tile's rows, for WEIGHTS of the hidden columns, each row to its pair's place."""
    num_blocks = tl.cdiv(hidden, WEIGHTS)
    tile, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if tile >= tl.load(num_tiles_ptr):
        return
    slot, first = tl.load(tiles_ptr + tile), tl.load(tiles_ptr + most_tiles + tile)
    rows = tl.load(tiles_ptr + 2 * most_tiles + tile)
    if FEWER < TOKENS and rows <= FEWER:
        _down(
            h_ptr, order_ptr + first, w, out_ptr, slot, first, rows, block, hidden, intermediate,
            WEIGHTS, FEWER, DEPTH, EVEN,
        )  # fmt: skip
    else:
        _down(
            h_ptr, order_ptr + first, w, out_ptr, slot, first, rows, block, hidden, intermediate,
            WEIGHTS, TOKENS, DEPTH, EVEN,
        )  # fmt: skip


@triton.jit
def _down(
    h_ptr,
    order_ptr,
    w,
    out_ptr,
    slot,
    first,
    rows,
    block,
    hidden,
    intermediate,
    WEIGHTS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    at, end = slot * hidden + block * WEIGHTS, (slot + 1) * hidden
    token = tl.arange(0, TOKENS)
    there = token < rows
    source = h_ptr + (first + token).to(tl.int64) * intermediate
    out = tl.zeros((WEIGHTS, TOKENS), tl.float32)
    for k in range(0, intermediate, DEPTH):
        d = _weights(w, at, k, end, intermediate, WEIGHTS, DEPTH, EVEN)
        h = _tokens(source, k, there, intermediate, DEPTH, EVEN)
        out = tl.dot(d, h, out, input_precision="ieee")
    pair = tl.load(order_ptr + token, mask=there, other=0)
    column = block * WEIGHTS + tl.arange(0, WEIGHTS)
    mask = (column < hidden)[:, None] & there[None, :]
    tl.store(
        out_ptr + pair[None, :].to(tl.int64) * hidden + column[:, None], out.to(out_ptr.dtype.element_ty), mask=mask
    )


@triton.jit
def add_up(out_ptr, slots_ptr, weights_ptr, poison_ptr, y_ptr, hidden, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    """One row's experts, weighted and added up."""
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < hidden
    y = tl.zeros((COLUMNS,), tl.float32) + tl.load(poison_ptr)
    for k in tl.static_range(TOP_K):
        pair = row * TOP_K + k
        if tl.load(slots_ptr + pair) >= 0:
            out = tl.load(out_ptr + pair.to(tl.int64) * hidden + column, mask=there, other=0.0)
            y += tl.load(weights_ptr + pair) * out.to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * hidden + column, y.to(y_ptr.dtype.element_ty), mask=there)
