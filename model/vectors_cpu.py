"""LLVM vectors that numba emits: what an fp32 CPU's kernels are made of. LLVM splits what is wider than registers.

Numba does not notice when an intrinsic changes: after editing this file, or one that emits by it, delete the
`__pycache__` folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

LANES = 16
"""Of the vectors that are emitted: a register of AVX-512, two of AVX2."""


def _has_wide_vectors() -> bool:
    """Whether numba compiles for AVX-512, of which a machine's name in `/proc` need not tell."""
    chosen: str | None = vars(config)["CPU_FEATURES"]
    if chosen is not None:
        return "+avx512f" in chosen.split(",")
    return bool(binding.get_host_cpu_features().get("avx512f"))


WIDE = _has_wide_vectors()
"""Whether there are 32 registers of 16 numbers, or 16 of 8."""

POINTER = types.CPointer(types.float32)
intrinsic_: Any = intrinsic

_F32, _I32 = ir.FloatType(), ir.IntType(32)

_HOW: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy"}
"""Dividing by 0 gives infinity or NaN: a branch to an error would keep a loop from being vectorised."""

_INNER = {**_HOW, "_nrt": False}
"""References to arrays are not counted: numba does that atomically, for each array that a function is called with."""

compiled: Any = numba.njit(**_HOW)
inner: Any = numba.njit(**_INNER)
"""For what is called within loops and makes no arrays."""
reordered: Any = numba.njit(**_INNER, fastmath={"reassoc", "contract", "nsz"})
"""Like `inner`; sums may be reordered, which is what vectorising them takes; NaN and infinity keep their meaning."""


def declare(signature: str) -> Any:
    """Compile for one signature, when the module is imported, so that no request waits and no other layout slips in."""
    return numba.njit(signature, **_HOW)


@intrinsic_  # type: ignore[untyped-decorator]
def address(typing_context: Any, array: Any, offset: Any) -> Any:
    """The address of an fp32 array's element, `offset` elements behind its first one."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return POINTER(array, types.intp), generate


@intrinsic_  # type: ignore[untyped-decorator]
def advance(typing_context: Any, pointer: Any, offset: Any) -> Any:
    """The address `offset` elements on."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return POINTER(POINTER, types.intp), generate


@intrinsic_  # type: ignore[untyped-decorator]
def fetch(typing_context: Any, pointer: Any) -> Any:
    """Prefetch the cache line of an address."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(POINTER), generate


class Emitter:
    """Vectors of `width` floats at a builder's position. Under a mask they are loaded and stored in part."""

    def __init__(self, builder: ir.IRBuilder, width: int) -> None:
        self.builder, self.width = builder, width
        self.vector = ir.VectorType(_F32, width)
        self.zero = ir.Constant(self.vector, [0.0] * width)
        self.filler: Any = self.zero
        """What lanes that are not loaded hold."""
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
        return self.builder.call(load, [pointer, _I32(4), self.mask, self.filler])

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
            vectors = [
                self.builder.fadd(*self._swap(first, second, distance))
                for first, second in zip(vectors[:distance], vectors[distance:], strict=True)
            ]
            distance //= 2
        return vectors[0]

    def transpose(self, vectors: list[Any]) -> list[Any]:
        """`width` vectors' lanes: each step swaps two quarters of a square, then those of its quarters."""
        turned, distance = list(vectors), self.width // 2
        while distance > 0:
            for n in range(self.width):
                if not n & distance:
                    turned[n], turned[n + distance] = self._swap(turned[n], turned[n + distance], distance)
            distance //= 2
        return turned

    def max_lanes(self, vector: Any) -> Any:
        """Of numbers."""
        return self.builder.call(self._function("llvm.vector.reduce.fmax", _F32, [self.vector]), [vector])

    def variables(self, count: int) -> list[Any]:
        """Zeros at first. LLVM keeps them in registers."""
        return [cgutils.alloca_once_value(self.builder, self.zero) for _ in range(count)]

    def _swap(self, first: Any, second: Any, distance: int) -> tuple[Any, Any]:
        """The upper of every two neighbouring groups of `distance` lanes of the first, for the lower of the second."""
        lanes = range(self.width)
        low = [i if not i & distance else self.width + i - distance for i in lanes]
        high = [i + distance if not i & distance else self.width + i for i in lanes]
        return self._shuffle(first, second, low), self._shuffle(first, second, high)

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


def forbid_unrolling(builder: ir.IRBuilder, end: Any) -> None:
    """Of the loop whose body ends with this block: two turns at once take more registers than there are."""
    module = builder.module
    forbid = module.add_metadata(["llvm.loop.unroll.disable"])
    # A loop's name is a node that begins with itself; equal nodes would be one, hence the number.
    name = module.add_metadata([_I32(len(module.metadata))])
    name.operands = (name, forbid)
    end.terminator.set_metadata("llvm.loop", name)


def prefetch(builder: ir.IRBuilder, address: Any) -> None:
    byte = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(address, byte), _I32(0), _I32(3), _I32(1)])


def for_vectors(emit: Emitter, size: Any, step: Callable[[Any], None]) -> None:
    """`step(at)` for every whole vector of `size` elements, and once more under a mask for the rest."""
    builder = emit.builder
    rest = builder.and_(size, size.type(emit.width - 1))
    whole = builder.sub(size, rest)
    with cgutils.for_range_slice(builder, size.type(0), whole, size.type(emit.width)) as (at, _):
        step(at)
        end = builder.block
    forbid_unrolling(builder, end)
    with builder.if_then(cgutils.is_not_null(builder, rest)):
        emit.mask_after(rest)
        step(whole)
        emit.mask = None
