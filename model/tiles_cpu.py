"""Register tiles: the innermost loop of matrix products on an fp32 CPU.

Left to itself a compiler does not keep a block of sums in registers. A tile is what BLIS calls a micro-kernel (Van Zee
and van de Geijn, ACM TOMS 41, 2015): its sums stay in registers while one pass over the weights streams by. Its size is
that of the machine's registers. Every sum is taken in the same order whatever size a tile has, so a row's result does
not depend on its batch.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from model.linear import PANEL
from model.vectors_cpu import POINTER, WIDE, Emitter, advance, forbid_unrolling, inner, intrinsic_, prefetch

MAX_ROWS = 12 if WIDE else 6
"""Rows of a tile."""
COLUMNS = 2 * PANEL if WIDE else PANEL
"""Columns of a tile, whole panels. The sums of 12 rows and two vectors of weights take 26 of AVX-512's 32 registers, as
its instructions read a factor from memory; those of 6 rows, two vectors and a factor take 15 of AVX2's 16."""


@inner  # type: ignore[untyped-decorator]
def multiply(
    rows: Any,
    columns: Any,
    depth: Any,
    x: Any,
    x_stride: Any,
    w: Any,
    w_stride: Any,
    w_panel: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    ahead: Any,
    ahead_step: Any,
) -> None:
    """`out[r, c] = Σ_i x[r, i] · w[i, c]` for up to `MAX_ROWS` rows and `COLUMNS` columns.

    Args:
        depth: how many `i`.
        x_stride: elements from one row to the next; likewise of `w` and `out`.
        w_panel: elements of `w` from sixteen columns to the next sixteen.
        add: 1 to add to `out`, 0 to overwrite it.
        ahead: what will be needed next, of as many panels; prefetched `ahead_step` elements of each at a time while
            this is computed.
    """
    if columns == COLUMNS:
        _whole_tile(rows, columns, depth, x, x_stride, w, w_stride, w_panel, out, out_stride, add, ahead, ahead_step)
        return
    for first in range(0, columns, PANEL):
        panel = first // PANEL * w_panel
        _part_tile(
            rows,
            min(PANEL, columns - first),
            depth,
            x,
            x_stride,
            advance(w, panel),
            w_stride,
            w_panel,
            advance(out, first),
            out_stride,
            add,
            advance(ahead, panel),
            ahead_step,
        )


@inner  # type: ignore[untyped-decorator]
def multiply_turned(
    rows: Any,
    columns: Any,
    depth: Any,
    x: Any,
    x_stride: Any,
    w: Any,
    w_stride: Any,
    w_panel: Any,
    out: Any,
    out_stride: Any,
    add: Any,
) -> None:
    """`out[r, c] = Σ_i x[i, r] · w[i, c]`, otherwise as `multiply`. Nothing is prefetched.

    Args:
        x_stride: elements from one `i` to the next.
    """
    if columns == COLUMNS:
        _whole_turned_tile(rows, columns, depth, x, x_stride, w, w_stride, w_panel, out, out_stride, add, w, 0)
        return
    for first in range(0, columns, PANEL):
        _part_turned_tile(
            rows,
            min(PANEL, columns - first),
            depth,
            x,
            x_stride,
            advance(w, first // PANEL * w_panel),
            w_stride,
            w_panel,
            advance(out, first),
            out_stride,
            add,
            w,
            0,
        )


def _tile_intrinsic(name: str, panels: int, *, masked: bool, turned: bool = False) -> Any:
    """`multiply`, or `multiply_turned`, for so many panels; under a mask for the `columns` of one."""
    size = types.intp
    kinds = (size, size, size, POINTER, size, POINTER, size, size, POINTER, size, size, POINTER, size)

    # Numba has to know each argument by a name of its own.
    def tile(
        typing_context: Any,
        rows: Any,
        columns: Any,
        depth: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        w_stride: Any,
        w_panel: Any,
        out: Any,
        out_stride: Any,
        add: Any,
        ahead: Any,
        ahead_step: Any,
    ) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            rows, columns, *operands = arguments
            for count in range(1, MAX_ROWS + 1):
                asked = builder.icmp_signed("==", rows, rows.type(count))
                with builder.if_then(asked):
                    emit = Emitter(builder, PANEL)
                    if masked:
                        emit.mask_after(columns)
                    _tile(emit, turned, count, panels, *operands)
            return context.get_dummy_value()

        return types.void(*kinds), generate

    tile.__name__ = tile.__qualname__ = name
    return intrinsic_(tile)


_whole_tile = _tile_intrinsic("_whole_tile", COLUMNS // PANEL, masked=False)
_part_tile = _tile_intrinsic("_part_tile", 1, masked=True)
_whole_turned_tile = _tile_intrinsic("_whole_turned_tile", COLUMNS // PANEL, masked=False, turned=True)
_part_turned_tile = _tile_intrinsic("_part_turned_tile", 1, masked=True, turned=True)


def _tile(
    emit: Emitter,
    turned: bool,
    rows: int,
    panels: int,
    depth: Any,
    x: Any,
    x_stride: Any,
    w: Any,
    w_stride: Any,
    w_panel: Any,
    out: Any,
    out_stride: Any,
    add: Any,
    ahead: Any,
    ahead_step: Any,
) -> None:
    """The code for so many rows and panels."""
    builder, size = emit.builder, depth.type
    sums = [emit.variables(panels) for _ in range(rows)]
    xs = [builder.gep(x, [size(row) if turned else builder.mul(x_stride, size(row))]) for row in range(rows)]
    ws = [builder.gep(w, [builder.mul(w_panel, size(panel))]) for panel in range(panels)]
    following = [builder.gep(ahead, [builder.mul(w_panel, size(panel))]) for panel in range(panels)]
    begins = [builder.gep(out, [builder.mul(out_stride, size(row))]) for row in range(rows)]
    outs = [[builder.gep(begin, [size(panel * PANEL)]) for panel in range(panels)] for begin in begins]
    with builder.if_then(cgutils.is_not_null(builder, add)):
        for row in range(rows):
            for total, place in zip(sums[row], outs[row], strict=True):
                builder.store(emit.load(place), total)
    with cgutils.for_range(builder, depth) as loop:
        if not turned:
            for start in following:
                prefetch(builder, builder.gep(start, [builder.mul(loop.index, ahead_step)]))
        x_at = builder.mul(loop.index, x_stride) if turned else loop.index
        at = builder.mul(loop.index, w_stride)
        weights = [emit.load(builder.gep(panel, [at])) for panel in ws]
        for row in range(rows):
            factor = emit.broadcast(builder.gep(xs[row], [x_at]))
            for total, weight in zip(sums[row], weights, strict=True):
                emit.add_product(total, factor, weight)
        end = builder.block
    forbid_unrolling(builder, end)
    for row in range(rows):
        for total, place in zip(sums[row], outs[row], strict=True):
            emit.store(builder.load(total), place)
