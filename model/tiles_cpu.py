"""Register tiles: the innermost loops of fp32 kernels on a CPU, emitted as LLVM vectors.

Left to itself a compiler neither keeps a block of sums in registers nor reduces them well. A tile is what BLIS calls a
micro-kernel (Van Zee and van de Geijn, ACM TOMS 41, 2015): its sums stay in registers while one pass over the weights
streams by. Its size is that of the machine's registers; LLVM splits the 16-wide vectors where they are narrower. Every
sum is taken in the same order whatever size a tile has, so a row's result does not depend on its batch.

Numba does not notice when an intrinsic changes: after editing this file, delete the `__pycache__` folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from model.linear import PANEL


def _has_wide_vectors() -> bool:
    """Whether numba compiles for AVX-512, of which a machine's name in `/proc` need not tell."""
    chosen: str | None = vars(config)["CPU_FEATURES"]
    if chosen is not None:
        return "+avx512f" in chosen.split(",")
    return bool(binding.get_host_cpu_features().get("avx512f"))


_WIDE = _has_wide_vectors()
MAX_ROWS = 12 if _WIDE else 6
"""Rows of a tile."""
COLUMNS = 2 * PANEL if _WIDE else PANEL
"""Columns of a tile, whole panels. The sums of 12 rows and two vectors of weights take 26 of AVX-512's 32 registers, as
its instructions read a factor from memory; those of 6 rows, two vectors and a factor take 15 of AVX2's 16."""

DOTS = 16 if _WIDE else 8
"""Products of vectors that are taken together: as many as a register has lanes, each being summed in one of them."""

_F32, _I1, _I32 = ir.FloatType(), ir.IntType(1), ir.IntType(32)
_POINTER = types.CPointer(types.float32)
_intrinsic: Any = intrinsic

_HOW: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
"""Dividing by 0 gives infinity or NaN: a branch to an error would keep a loop from being vectorised."""

compiled: Any = numba.njit(**_HOW)
reordered: Any = numba.njit(**_HOW, fastmath={"reassoc", "contract", "nsz"})
"""Sums may be reordered, which is what vectorising them takes; NaN and infinity keep their meaning."""


def declare(signature: str) -> Any:
    """Compile for one signature, when the module is imported, so that no request waits and no other layout slips in."""
    return numba.njit(signature, **_HOW)


@_intrinsic  # type: ignore[untyped-decorator]
def address(typing_context: Any, array: Any, offset: Any) -> Any:
    """The address of an fp32 array's element, `offset` elements behind its first one."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return _POINTER(array, types.intp), generate


@_intrinsic  # type: ignore[untyped-decorator]
def advance(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """The address `offset` elements on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return _POINTER(_POINTER, types.intp), generate


@_intrinsic  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, pointer: Any) -> Any:
    """Prefetch the cache line of an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        _prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(_POINTER), generate


class _Emitter:
    """Vectors of `width` floats at a builder's position. Under a mask they are loaded and stored in part."""

    def __init__(self, builder: ir.IRBuilder, width: int) -> None:
        self.builder, self.width = builder, width
        self.vector = ir.VectorType(_F32, width)
        self.zero: Any = ir.Constant(self.vector, [0.0] * width)
        self.mask: Any = None

    def mask_after(self, count: Any) -> None:
        """Touch only the first `count` lanes from here on."""
        lanes = ir.Constant(ir.VectorType(count.type, self.width), list(range(self.width)))
        self.mask = self.builder.icmp_signed("<", lanes, self._splat(count, count.type))

    def load(self, address: Any) -> Any:
        pointer = self.builder.bitcast(address, self.vector.as_pointer())
        if self.mask is None:
            return self.builder.load(pointer, align=4)
        kinds = [pointer.type, _I32, self.mask.type, self.vector]
        load = self._function("llvm.masked.load", self.vector, kinds, "p0")
        return self.builder.call(load, [pointer, _I32(4), self.mask, self.zero])

    def store(self, value: Any, address: Any) -> None:
        pointer = self.builder.bitcast(address, self.vector.as_pointer())
        if self.mask is None:
            self.builder.store(value, pointer, align=4)
            return
        kinds = [self.vector, pointer.type, _I32, self.mask.type]
        store = self._function("llvm.masked.store", ir.VoidType(), kinds, "p0")
        self.builder.call(store, [value, pointer, _I32(4), self.mask])

    def broadcast(self, address: Any) -> Any:
        return self.splat(self.builder.load(address, align=4))

    def splat(self, value: Any) -> Any:
        """A number in every lane."""
        return self._splat(value, _F32)

    def add_product(self, total: Any, a: Any, b: Any) -> None:
        """`total += a · b`, where `total` is a variable."""
        fma = self._function("llvm.fma", self.vector, [self.vector] * 3)
        self.builder.store(self.builder.call(fma, [a, b, self.builder.load(total)]), total)

    def sum_lanes(self, vector: Any) -> Any:
        add = self._function("llvm.vector.reduce.fadd", _F32, [_F32, self.vector])
        return self.builder.call(add, [ir.Constant(_F32, -0.0), vector], fastmath=("reassoc",))

    def sum_each(self, vectors: list[Any]) -> Any:
        """The sum over each of `width` vectors, in the lane of its number: each step adds halves of two vectors."""
        distance = self.width // 2
        while distance > 0:
            lanes = range(self.width)
            low = [i if not i & distance else self.width + i - distance for i in lanes]
            high = [i + distance if not i & distance else self.width + i for i in lanes]
            vectors = [
                self.builder.fadd(self._shuffle(first, second, low), self._shuffle(first, second, high))
                for first, second in zip(vectors[:distance], vectors[distance:], strict=True)
            ]
            distance //= 2
        return vectors[0]

    def max_lanes(self, vector: Any) -> Any:
        """Of numbers."""
        return self.builder.call(self._function("llvm.vector.reduce.fmax", _F32, [self.vector]), [vector])

    def variables(self, count: int) -> list[Any]:
        """Zeros at first. LLVM keeps them in registers."""
        return [cgutils.alloca_once_value(self.builder, self.zero) for _ in range(count)]

    def _shuffle(self, first: Any, second: Any, lanes: list[int]) -> Any:
        return self.builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, self.width), lanes))

    def _splat(self, value: Any, kind: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(kind, self.width), ir.Undefined)
        first = self.builder.insert_element(undefined, value, _I32(0))
        lanes = ir.Constant(ir.VectorType(_I32, self.width), [0] * self.width)
        return self.builder.shuffle_vector(first, undefined, lanes)

    def _function(self, name: str, result: Any, arguments: list[Any], suffix: str = "") -> Any:
        full = ".".join(filter(None, (name, f"v{self.width}f32", suffix)))
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), full)


def _forbid_unrolling(builder: ir.IRBuilder, end: Any) -> None:
    """Of the loop whose body ends with this block: two turns at once take more registers than there are."""
    module = builder.module
    forbid = module.add_metadata(["llvm.loop.unroll.disable"])
    # A loop's name is a node that begins with itself; equal nodes would be one, hence the number.
    name = module.add_metadata([_I32(len(module.metadata))])
    name.operands = (name, forbid)
    end.terminator.set_metadata("llvm.loop", name)


def _prefetch(builder: ir.IRBuilder, address: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(address, byte), _I32(0), _I32(3), _I32(1)])


@compiled  # type: ignore[untyped-decorator]
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


def _tile_intrinsic(name: str, panels: int, masked: bool) -> Any:
    """`multiply` for so many panels; under a mask for the `columns` of one."""

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
                    emit = _Emitter(builder, PANEL)
                    if masked:
                        emit.mask_after(columns)
                    _tile(emit, count, panels, *operands)
            return context.get_dummy_value()

        size = types.intp
        kinds = (size, size, size, _POINTER, size, _POINTER, size, size, _POINTER, size, size, _POINTER, size)
        return types.void(*kinds), generate

    tile.__name__ = tile.__qualname__ = name
    return _intrinsic(tile)


_whole_tile = _tile_intrinsic("_whole_tile", COLUMNS // PANEL, masked=False)
_part_tile = _tile_intrinsic("_part_tile", 1, masked=True)


def _tile(
    emit: _Emitter,
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
    xs = [builder.gep(x, [builder.mul(x_stride, size(row))]) for row in range(rows)]
    ws = [builder.gep(w, [builder.mul(w_panel, size(panel))]) for panel in range(panels)]
    following = [builder.gep(ahead, [builder.mul(w_panel, size(panel))]) for panel in range(panels)]
    begins = [builder.gep(out, [builder.mul(out_stride, size(row))]) for row in range(rows)]
    outs = [[builder.gep(begin, [size(panel * PANEL)]) for panel in range(panels)] for begin in begins]
    with builder.if_then(cgutils.is_not_null(builder, add)):
        for row in range(rows):
            for total, place in zip(sums[row], outs[row], strict=True):
                builder.store(emit.load(place), total)
    with cgutils.for_range(builder, depth) as loop:
        for start in following:
            _prefetch(builder, builder.gep(start, [builder.mul(loop.index, ahead_step)]))
        at = builder.mul(loop.index, w_stride)
        weights = [emit.load(builder.gep(panel, [at])) for panel in ws]
        for row in range(rows):
            factor = emit.broadcast(builder.gep(xs[row], [loop.index]))
            for total, weight in zip(sums[row], weights, strict=True):
                emit.add_product(total, factor, weight)
        end = builder.block
    _forbid_unrolling(builder, end)
    for row in range(rows):
        for total, place in zip(sums[row], outs[row], strict=True):
            emit.store(builder.load(total), place)


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


@_intrinsic  # type: ignore[untyped-decorator]
def exp(typing_context: Any, x: Any) -> Any:
    """The exponential function, written so that a loop over it vectorises."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return _exp(builder, arguments[0])

    return types.float32(types.float32), generate


def _for_vectors(emit: _Emitter, size: Any, step: Callable[[Any], None]) -> None:
    """`step(at)` for every whole vector of `size` elements, and once more under a mask for the rest."""
    builder = emit.builder
    rest = builder.and_(size, size.type(emit.width - 1))
    whole = builder.sub(size, rest)
    with cgutils.for_range_slice(builder, size.type(0), whole, size.type(emit.width)) as (at, _):
        step(at)
        end = builder.block
    _forbid_unrolling(builder, end)
    with builder.if_then(cgutils.is_not_null(builder, rest)):
        emit.mask_after(rest)
        step(whole)
        emit.mask = None


@_intrinsic  # type: ignore[untyped-decorator]
def dots(typing_context: Any, x: Any, y: Any, offsets: Any, start: Any, depth: Any, factor: Any, out: Any) -> Any:
    """`out[n] = factor · Σ_i x[i] · y_n[i]` for the `DOTS` vectors `y_n` that begin `offsets[start + n]` behind `y`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        x, y, offsets, start, depth, factor, out = arguments
        emit = _Emitter(builder, DOTS)
        numbers = builder.gep(context.make_array(signature.args[2])(context, builder, offsets).data, [start])
        ys = [builder.gep(y, [builder.load(builder.gep(numbers, [depth.type(n)]))]) for n in range(DOTS)]
        sums = emit.variables(DOTS)

        def step(at: Any) -> None:
            part = emit.load(builder.gep(x, [at]))
            for total, row in zip(sums, ys, strict=True):
                emit.add_product(total, part, emit.load(builder.gep(row, [at])))

        _for_vectors(emit, depth, step)
        totals = emit.sum_each([builder.load(total) for total in sums])
        emit.store(builder.fmul(totals, emit.splat(factor)), out)
        return context.get_dummy_value()

    size, number = types.intp, types.float32
    return types.void(_POINTER, _POINTER, offsets, size, size, number, _POINTER), generate


@_intrinsic  # type: ignore[untyped-decorator]
def sum_of_squares(typing_context: Any, x: Any, size: Any) -> Any:
    """`Σ_i x[i]²`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        # Several registers at once: each sum waits for the one before it.
        (x, size), emit = arguments, _Emitter(builder, 4 * PANEL)
        (total,) = emit.variables(1)

        def step(at: Any) -> None:
            value = emit.load(builder.gep(x, [at]))
            emit.add_product(total, value, value)

        _for_vectors(emit, size, step)
        return emit.sum_lanes(builder.load(total))

    return types.float32(_POINTER, types.intp), generate


@_intrinsic  # type: ignore[untyped-decorator]
def largest_of(typing_context: Any, x: Any, size: Any, least: Any) -> Any:
    """The largest of the numbers, but at least `least`; NaN is passed over."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, least), emit = arguments, _Emitter(builder, 4 * PANEL)
        most = cgutils.alloca_once_value(builder, emit.splat(least))
        emit.zero = emit.splat(least)

        def step(at: Any) -> None:
            value = emit.load(builder.gep(x, [at]))
            above = builder.fcmp_ordered(">", value, builder.load(most))
            builder.store(builder.select(above, value, builder.load(most)), most)

        _for_vectors(emit, size, step)
        return emit.max_lanes(builder.load(most))

    return types.float32(_POINTER, types.intp, types.float32), generate


@_intrinsic  # type: ignore[untyped-decorator]
def exponentials(typing_context: Any, x: Any, size: Any, shift: Any) -> Any:
    """`x[i] = exp(x[i] - shift)`, in place; their sum."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, shift), emit = arguments, _Emitter(builder, 4 * PANEL)
        shifts, (total,) = emit.splat(shift), emit.variables(1)

        def step(at: Any) -> None:
            place = builder.gep(x, [at])
            value = _exp(builder, builder.fsub(emit.load(place), shifts))
            if emit.mask is not None:
                value = builder.select(emit.mask, value, emit.zero)
            emit.store(value, place)
            builder.store(builder.fadd(builder.load(total), value), total)

        _for_vectors(emit, size, step)
        return emit.sum_lanes(builder.load(total))

    return types.float32(_POINTER, types.intp, types.float32), generate


@_intrinsic  # type: ignore[untyped-decorator]
def scale_row(typing_context: Any, x: Any, factor: Any, weight: Any, size: Any, out: Any) -> Any:
    """`out[i] = weight[i] · (x[i] · factor)`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, factor, weight, size, out), emit = arguments, _Emitter(builder, PANEL)
        factors = emit.splat(factor)

        def step(at: Any) -> None:
            value = builder.fmul(emit.load(builder.gep(x, [at])), factors)
            emit.store(builder.fmul(emit.load(builder.gep(weight, [at])), value), builder.gep(out, [at]))

        _for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(_POINTER, types.float32, _POINTER, types.intp, _POINTER), generate


@_intrinsic  # type: ignore[untyped-decorator]
def copy_row(typing_context: Any, x: Any, size: Any, out: Any) -> Any:
    """`out[i] = x[i]`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, size, out), emit = arguments, _Emitter(builder, PANEL)

        def step(at: Any) -> None:
            emit.store(emit.load(builder.gep(x, [at])), builder.gep(out, [at]))

        _for_vectors(emit, size, step)
        return context.get_dummy_value()

    return types.void(_POINTER, types.intp, _POINTER), generate


@_intrinsic  # type: ignore[untyped-decorator]
def rotate(typing_context: Any, x: Any, cos: Any, sin: Any, half: Any) -> Any:
    """Rotate `x[i]` and `x[i + half]` into each other, in place; `cos` and `sin` are of `2 · half` elements."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        (x, cos, sin, half), emit = arguments, _Emitter(builder, PANEL)

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

        _for_vectors(emit, half, step)
        return context.get_dummy_value()

    return types.void(_POINTER, _POINTER, _POINTER, types.intp), generate
