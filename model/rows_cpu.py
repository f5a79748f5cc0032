"""What is done to a row of any length on an fp32 CPU, by whole vectors: dot products, norms, rotation, exponentials.

Left to itself a compiler neither reduces well nor keeps a loop of few turns free of its overhead.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from model.vectors_cpu import LANES, POINTER, WIDE, Emitter, for_vectors, intrinsic_

DOTS = 16 if WIDE else 8
"""Products of vectors that are taken together: as many as a register has lanes, each being summed in one of them."""

_I32 = ir.IntType(32)


def _exp(builder: ir.IRBuilder, x: Any) -> Any:
    """Cephes' `expf` (2 ulp) of a number or a vector, for arguments up to 88; 0 below -87."""
    width = x.type.count if isinstance(x.type, ir.VectorType) else 0
    integers, suffix = (ir.VectorType(_I32, width), f"v{width}f32") if width else (_I32, "f32")

    def constant(value: float, kind: Any = x.type) -> Any:
        return ir.Constant(kind, [value] * width if width else value)

    def call(name: str, *arguments: Any) -> Any:
        kind = ir.FunctionType(x.type, [x.type] * len(arguments))
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"{name}.{suffix}"), arguments)

    least = constant(-87.0)
    # Below this the result underflows; NaN fails the comparison and stays.
    y = builder.select(builder.fcmp_ordered("<", x, least), least, x)
    n = call("llvm.floor", call("llvm.fma", y, constant(1.44269504), constant(0.5)))
    r = call("llvm.fma", n, constant(2.12194440e-4), call("llvm.fma", n, constant(-0.693359375), y))
    p = constant(1.9875691500e-4)
    for factor in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = call("llvm.fma", p, r, constant(factor))
    small = builder.fadd(call("llvm.fma", builder.fmul(p, r), r, r), constant(1.0))
    exponent = builder.shl(builder.add(builder.fptosi(n, integers), constant(127, integers)), constant(23, integers))
    return builder.fmul(small, builder.bitcast(exponent, x.type))


@intrinsic_  # type: ignore[untyped-decorator]
def exp(typing_context: Any, x: Any) -> Any:
    """The exponential function, written so that a loop over it vectorises."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return _exp(builder, arguments[0])

    return types.float32(types.float32), generate


@intrinsic_  # type: ignore[untyped-decorator]
def dots(typing_context: Any, x: Any, y: Any, offsets: Any, start: Any, depth: Any, factor: Any, out: Any) -> Any:
    """`out[n] = factor · Σ_i x[i] · y_n[i]` for the `DOTS` vectors `y_n` that begin `offsets[start + n]` behind `y`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, y, offsets, start, depth, factor, out = arguments
        emit = Emitter(builder, DOTS)
        numbers = builder.gep(context.make_array(signature.args[2])(context, builder, offsets).data, [start])
        ys = [builder.gep(y, [builder.load(builder.gep(numbers, [depth.type(n)]))]) for n in range(DOTS)]
        sums = emit.variables(DOTS)

        def step(at: Any) -> None:
            part = emit.load(builder.gep(x, [at]))
            for total, row in zip(sums, ys, strict=True):
                emit.add_product(total, part, emit.load(builder.gep(row, [at])))

        for_vectors(emit, depth, step)
        totals = emit.sum_each([builder.load(total) for total in sums])
        emit.store(builder.fmul(totals, emit.splat(factor)), out)
        return context.get_dummy_value()

    size, number = types.intp, types.float32
    return types.void(POINTER, POINTER, offsets, size, size, number, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def pack_rows(typing_context: Any, x: Any, offsets: Any, depth: Any, factor: Any, out: Any) -> Any:
    """`out[i, r] = factor · x_r[i]` for the `LANES` vectors `x_r` that begin `offsets[r]` behind `x`.

    Args:
        depth: of each vector, a multiple of `LANES`.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, offsets, depth, factor, out = arguments
        emit = Emitter(builder, LANES)
        numbers = context.make_array(signature.args[1])(context, builder, offsets).data
        xs = [builder.gep(x, [builder.load(builder.gep(numbers, [depth.type(r)]))]) for r in range(LANES)]
        factors = emit.splat(factor)
        with cgutils.for_range_slice(builder, depth.type(0), depth, depth.type(LANES)) as (at, _):
            turned = emit.transpose([emit.load(builder.gep(row, [at])) for row in xs])
            for i, vector in enumerate(turned):
                place = builder.mul(builder.add(at, depth.type(i)), depth.type(LANES))
                emit.store(builder.fmul(vector, factors), builder.gep(out, [place]))
        return context.get_dummy_value()

    return types.void(POINTER, offsets, types.intp, types.float32, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def sum_of_squares(typing_context: Any, x: Any, size: Any) -> Any:
    """`Σ_i x[i]²`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        # Several registers at once: each sum waits for the one before it.
        (x, size), emit = arguments, Emitter(builder, 4 * LANES)
        (total,) = emit.variables(1)

        def step(at: Any) -> None:
            value = emit.load(builder.gep(x, [at]))
            emit.add_product(total, value, value)

        for_vectors(emit, size, step)
        return emit.sum_lanes(builder.load(total))

    return types.float32(POINTER, types.intp), generate


@intrinsic_  # type: ignore[untyped-decorator]
def largest_of(typing_context: Any, x: Any, size: Any, least: Any) -> Any:
    """The largest of the numbers, but at least `least`; NaN is passed over."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, least), emit = arguments, Emitter(builder, 4 * LANES)
        most = cgutils.alloca_once_value(builder, emit.splat(least))
        emit.filler = emit.splat(least)

        def step(at: Any) -> None:
            value = emit.load(builder.gep(x, [at]))
            above = builder.fcmp_ordered(">", value, builder.load(most))
            builder.store(builder.select(above, value, builder.load(most)), most)

        for_vectors(emit, size, step)
        return emit.max_lanes(builder.load(most))

    return types.float32(POINTER, types.intp, types.float32), generate


@intrinsic_  # type: ignore[untyped-decorator]
def exponentials(typing_context: Any, x: Any, size: Any, shift: Any) -> Any:
    """`x[i] = exp(x[i] - shift)`, in place; their sum."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, shift), emit = arguments, Emitter(builder, 4 * LANES)
        shifts, (total,) = emit.splat(shift), emit.variables(1)

        def step(at: Any) -> None:
            place = builder.gep(x, [at])
            value = _exp(builder, builder.fsub(emit.load(place), shifts))
            if emit.mask is not None:
                value = builder.select(emit.mask, value, emit.zero)
            emit.store(value, place)
            builder.store(builder.fadd(builder.load(total), value), total)

        for_vectors(emit, size, step)
        return emit.sum_lanes(builder.load(total))

    return types.float32(POINTER, types.intp, types.float32), generate


@intrinsic_  # type: ignore[untyped-decorator]
def exponential_columns(
    typing_context: Any, x: Any, stride: Any, count: Any, largest: Any, total: Any, factor: Any
) -> Any:
    """Carry the softmax of `LANES` columns on, each by itself: in `count` rows `x[i, c] = exp(x[i, c] - m[c])`, where
    `m[c]` is the largest of them and of `largest[c]`, which becomes it.

    What was summed up so far is to be multiplied by `factor[c]`, which is written, and so is `total[c]` before what is
    added to it. Minus infinity gives 0. NaN is no largest, but stays.

    Args:
        stride: elements from one row to the next.
    """

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, stride, count, largest, total, factor), emit = arguments, Emitter(builder, LANES)
        before = emit.load(largest)
        most = cgutils.alloca_once_value(builder, before)
        with cgutils.for_range(builder, count) as loop:
            value = emit.load(builder.gep(x, [builder.mul(loop.index, stride)]))
            above = builder.fcmp_ordered(">", value, builder.load(most))
            builder.store(builder.select(above, value, builder.load(most)), most)
        shift, (added,) = builder.load(most), emit.variables(1)
        nothing = ir.Constant(emit.vector, [-math.inf] * LANES)
        with cgutils.for_range(builder, count) as loop:
            place = builder.gep(x, [builder.mul(loop.index, stride)])
            score = emit.load(place)
            value = _exp(builder, builder.fsub(score, shift))
            # Not the least that there is, which `_exp` would give.
            value = builder.select(builder.fcmp_ordered("==", score, nothing), emit.zero, value)
            emit.store(value, place)
            builder.store(builder.fadd(builder.load(added), value), added)
        scale = _exp(builder, builder.fsub(before, shift))
        emit.store(scale, factor)
        emit.store(builder.fadd(builder.fmul(emit.load(total), scale), builder.load(added)), total)
        emit.store(shift, largest)
        return context.get_dummy_value()

    size = types.intp
    return types.void(POINTER, size, size, POINTER, POINTER, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def scale_row(typing_context: Any, x: Any, factor: Any, weight: Any, size: Any, out: Any) -> Any:
    """`out[i] = weight[i] · (x[i] · factor)`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, factor, weight, size, out), emit = arguments, Emitter(builder, LANES)
        factors = emit.splat(factor)

        def step(at: Any) -> None:
            value = builder.fmul(emit.load(builder.gep(x, [at])), factors)
            emit.store(builder.fmul(emit.load(builder.gep(weight, [at])), value), builder.gep(out, [at]))

        for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(POINTER, types.float32, POINTER, types.intp, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def add_scaled_row(typing_context: Any, x: Any, factor: Any, size: Any, out: Any) -> Any:
    """`out[i] += factor · x[i]`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, factor, size, out), emit = arguments, Emitter(builder, LANES)
        factors = emit.splat(factor)

        def step(at: Any) -> None:
            place = builder.gep(out, [at])
            emit.store(builder.fadd(emit.load(place), builder.fmul(factors, emit.load(builder.gep(x, [at])))), place)

        for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(POINTER, types.float32, types.intp, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def add_row(typing_context: Any, x: Any, size: Any, out: Any) -> Any:
    """`out[i] += x[i]`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, out), emit = arguments, Emitter(builder, LANES)

        def step(at: Any) -> None:
            place = builder.gep(out, [at])
            emit.store(builder.fadd(emit.load(place), emit.load(builder.gep(x, [at]))), place)

        for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(POINTER, types.intp, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def copy_row(typing_context: Any, x: Any, size: Any, out: Any) -> Any:
    """`out[i] = x[i]`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, out), emit = arguments, Emitter(builder, LANES)

        def step(at: Any) -> None:
            emit.store(emit.load(builder.gep(x, [at])), builder.gep(out, [at]))

        for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(POINTER, types.intp, POINTER), generate


@intrinsic_  # type: ignore[untyped-decorator]
def rotate(typing_context: Any, x: Any, cos: Any, sin: Any, half: Any) -> Any:
    """Rotate `x[i]` and `x[i + half]` into each other, in place; `cos` and `sin` are of `2 · half` elements."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, cos, sin, half), emit = arguments, Emitter(builder, LANES)

        def step(at: Any) -> None:
            here, there = at, builder.add(at, half)
            a, b = (builder.gep(x, [place]) for place in (here, there))
            first, second = emit.load(a), emit.load(b)
            turned = []
            for place, own, other in ((here, first, second), (there, second, first)):
                c, s = (emit.load(builder.gep(table, [place])) for table in (cos, sin))
                turned.append((builder.fmul(own, c), builder.fmul(other, s)))
            emit.store(builder.fsub(*turned[0]), a)
            emit.store(builder.fadd(*turned[1]), b)

        for_vectors(emit, half, step)
        return context.get_dummy_value()

    return types.void(POINTER, POINTER, POINTER, types.intp), generate
