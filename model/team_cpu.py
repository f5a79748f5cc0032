"""Threads that share one compiled call, as far as they come in time.

A decode step is a few hundred short loops. Handing each to a thread pool costs more than it saves, and on a machine
that other processes use, a thread may not get its turn for milliseconds. So a whole half layer is one call with several
*stages* of *blocks*; every thread that is there takes the next block until a stage has none left, and goes on when all
of its blocks are done. The caller computes whatever nobody else has taken: a helper that comes late, or never, costs
nothing but its help. Which thread computes a block changes no bit of it.

A kernel is compiled with `declare` and takes the team's state, its turn, and whether its caller leads:

    def kernel(state, turn, leads, ...):
        if not enter(state, turn, leads):
            return
        block = take(state, 0)
        while block < num_blocks:
            ...
            block = done(state, 0)
        wait(state, 0, num_blocks)
        note(state, 0, leads)
        leave(state, leads)

With `note` the caller learns when each stage was done: `Team.stage_s`.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from model.threads import Apart
from model.vectors_cpu import inner

_LINE = 8
"""Counters are a cache line apart."""
_OPEN, _INSIDE, _FIRST_STAGE = 0, _LINE, 2 * _LINE
_MAX_STAGES = 8
_BEGUN = _FIRST_STAGE + 2 * _LINE * _MAX_STAGES
"""When the call began, in nanoseconds; then when each stage was done."""
_SPINS = 500
"""Looks before a waiting thread offers its core to others: some microseconds."""

_END_S = 5.0

Kernel = Callable[..., None]


class Team:
    """The calling thread and `size - 1` helpers, which sleep between calls. Used by one thread at a time."""

    def __init__(self, size: int) -> None:
        self._state = np.zeros(_BEGUN + 1 + _MAX_STAGES, np.int64)
        self._turn = 0
        self._apart = Apart()
        self._helpers = [_Helper(self._state, self._apart) for _ in range(size - 1)]
        for helper in self._helpers:
            weakref.finalize(self, helper.end)

    def run(self, kernel: Kernel, *arguments: object) -> None:
        """`kernel(state, turn, leads, *arguments)` on every thread that comes in time. Returns when it is all done."""
        self._turn += 1
        if self._helpers:
            self._apart.from_caller()
        for helper in self._helpers:
            helper.call((kernel, self._turn, arguments))
        kernel(self._state, self._turn, 1, *arguments)

    def stage_s(self, num_stages: int) -> list[float]:
        """How long the first so many stages of the last call took its caller, if the kernel notes them."""
        times: list[int] = self._state[_BEGUN : _BEGUN + 1 + num_stages].tolist()
        return [(after - before) * 1e-9 for before, after in itertools.pairwise(times)]


class _Helper:
    """One more thread. It knows the last call only: what it was too late for is done."""

    def __init__(self, state: Any, apart: Apart) -> None:
        self._state, self._apart = state, apart
        self._job: tuple[Kernel, int, tuple[object, ...]] | None = None
        self._asleep = threading.Lock()
        self._asleep.acquire()
        self._thread = threading.Thread(target=self._serve, name="team", daemon=True)
        self._thread.start()

    def call(self, job: tuple[Kernel, int, tuple[object, ...]] | None) -> None:
        self._job = job
        if self._asleep.locked():
            self._asleep.release()

    def end(self) -> None:
        self.call(None)
        self._thread.join(_END_S)

    def _serve(self) -> None:
        self._apart.add()
        while True:
            # Woken by the next call, or by the end of the team: there is nothing that a deadline could tell.
            self._asleep.acquire()
            job = self._job
            if job is None:
                return
            kernel, turn, arguments = job
            kernel(self._state, turn, 0, *arguments)


_intrinsic: Any = intrinsic
_I32, _I64 = ir.IntType(32), ir.IntType(64)
_MONOTONIC = ir.Constant(_I32, 1)
_yield_core: Any = types.ExternalFunction("sched_yield", types.int32())


def _counter(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


@_intrinsic  # type: ignore[untyped-decorator]
def _fetch_add(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    """Add to a counter; what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = _counter(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.atomic_rmw("add", counter, arguments[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), generate


@_intrinsic  # type: ignore[untyped-decorator]
def _load(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = _counter(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load_atomic(counter, "seq_cst", 8)

    return types.int64(array, types.intp), generate


@_intrinsic  # type: ignore[untyped-decorator]
def _store(typing_context: Any, array: Any, index: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counter = _counter(context, builder, signature.args[0], arguments[0], arguments[1])
        builder.store_atomic(arguments[2], counter, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), generate


@_intrinsic  # type: ignore[untyped-decorator]
def _now(typing_context: Any) -> Any:
    """Nanoseconds of Python's `time.perf_counter_ns`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        time = cgutils.alloca_once(builder, ir.ArrayType(_I64, 2))
        kind = ir.FunctionType(_I32, [_I32, time.type])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "clock_gettime"), [_MONOTONIC, time])
        seconds, nanoseconds = (builder.load(builder.gep(time, [_I32(0), _I32(field)])) for field in range(2))
        return builder.add(builder.mul(seconds, _I64(10**9)), nanoseconds)

    return types.int64(), generate


@inner  # type: ignore[untyped-decorator]
def enter(state: Any, turn: Any, leads: Any) -> Any:
    """Whether this thread is in time. `_OPEN` is twice the turn while a call is open, and one more afterwards."""
    if leads:
        for counter in range(_FIRST_STAGE, _BEGUN, _LINE):
            _store(state, counter, 0)
        state[_BEGUN] = _now()
        _store(state, _OPEN, 2 * turn)
        return True
    spins = 0
    while _load(state, _OPEN) < 2 * turn:
        spins = _spin(spins)
    _fetch_add(state, _INSIDE, 1)
    if _load(state, _OPEN) == 2 * turn:
        return True
    _fetch_add(state, _INSIDE, -1)
    return False


@inner  # type: ignore[untyped-decorator]
def leave(state: Any, leads: Any) -> None:
    """The leader lets nobody in any more, and stays until all others are out: its arrays are in use no longer."""
    if not leads:
        _fetch_add(state, _INSIDE, -1)
        return
    _fetch_add(state, _OPEN, 1)
    spins = 0
    while _load(state, _INSIDE) > 0:
        spins = _spin(spins)


@inner  # type: ignore[untyped-decorator]
def take(state: Any, stage: Any) -> Any:
    """The number of a block that is this thread's."""
    return _fetch_add(state, _FIRST_STAGE + 2 * _LINE * stage, 1)


@inner  # type: ignore[untyped-decorator]
def done(state: Any, stage: Any) -> Any:
    """The block that was taken is done; the next one."""
    _fetch_add(state, _FIRST_STAGE + 2 * _LINE * stage + _LINE, 1)
    return take(state, stage)


@inner  # type: ignore[untyped-decorator]
def wait(state: Any, stage: Any, num_blocks: Any) -> None:
    """Until the blocks that others have taken are done, too."""
    spins = 0
    while _load(state, _FIRST_STAGE + 2 * _LINE * stage + _LINE) < num_blocks:
        spins = _spin(spins)


@inner  # type: ignore[untyped-decorator]
def note(state: Any, stage: Any, leads: Any) -> None:
    """The stage is done, and the leader goes on."""
    if leads:
        state[_BEGUN + 1 + stage] = _now()


@inner  # type: ignore[untyped-decorator]
def _spin(spins: Any) -> Any:
    if spins >= _SPINS:
        _yield_core()
    return spins + 1
