"""A round of a lane: to all shards, the wait for their replies, and the sums, one compiled call each.

What the interpreter does for each shard takes as long as a small frame's way. So a link says in an array what compiled
code has to know of it, and an exchange has the addresses of these. Of many rows, threads write and add parts.

Shapes: `X` shards, `T` tokens, `K` experts per token, `W` 32-bit words per row, `H` hidden.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types

from model.vectors_cpu import compiled, declare, intrinsic_
from router.frames import GIVES_WAY, OPEN_ROUNDS, SHARED
from router.frames_cpu import add_reply, call_bytes, send_call, write_call
from router.wire_cpu import COUNT, OK, STATE_FIELDS, receive

FD, EPOCH, NUM_CALLS, MAX_ROWS, WITHIN_HOST, SHARES, BUSY, TIMEOUT_MS, FRAME_WORDS, INBOX, CALLS = range(
    STATE_FIELDS, STATE_FIELDS + 11
)
"""Fields of a link, behind the state of its inbox. `BUSY` says that a call is not sent whole yet. Then the addresses of
the inbox, of the frames for calls, and of those that replies are shared in, 0 where none are."""
REPLIES = CALLS + OPEN_ROUNDS
FIELDS = REPLIES + OPEN_ROUNDS

_array_at: Any = vars(numba)["carray"]

TOO_MANY_ROWS, UNSENT = -1, -9
"""Nothing was sent to any shard; nothing to this one, and why takes a closer look."""


def _pointer_to(kind: Any, bits: int) -> Any:
    @intrinsic_  # type: ignore[untyped-decorator]
    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], ir.IntType(bits).as_pointer())

        return types.CPointer(kind)(types.int64), generate

    return pointer


_words, _longs = _pointer_to(types.int32, 32), _pointer_to(types.int64, 64)


@compiled  # type: ignore[untyped-decorator]
def _fields(address: Any) -> Any:
    return _array_at(_longs(address), (FIELDS,))


@compiled  # type: ignore[untyped-decorator]
def _frame(address: Any, size: Any) -> Any:
    return _array_at(_words(address), (size,))


@compiled  # type: ignore[untyped-decorator]
def _inbox(link: Any) -> Any:
    return _array_at(_words(link[INBOX]), (OPEN_ROUNDS, link[FRAME_WORDS]))


@compiled  # type: ignore[untyped-decorator]
def _next_frame(link: Any) -> Any:
    """For the next call. Empty if the last one is not sent whole, or nobody has received the one that it holds."""
    number = link[NUM_CALLS]
    free = link[BUSY] == 0 and link[COUNT] > number - OPEN_ROUNDS
    return _frame(link[CALLS + number % OPEN_ROUNDS], link[FRAME_WORDS] if free else 0)


@declare(  # type: ignore[untyped-decorator]
    "void(i8[::1], i4[:,::1], i8[::1], i8[:,::1], i4[:,:,::1], f4[:,:,::1], i8, i8)"
)
def write(links: Any, x: Any, counts: Any, rows: Any, slots: Any, weights: Any, first: Any, last: Any) -> None:
    """Write the rows `first … last - 1` of what each shard is sent into the frames of the next call, where it fits.

    Args: as for `send`.
    """
    for shard in range(len(links)):
        link, count = _fields(links[shard]), counts[shard]
        frame = _next_frame(link)
        if count <= link[MAX_ROWS] and len(frame) > 0:
            part = rows[shard, :count], slots[shard, :count], weights[shard, :count]
            write_call(frame, x, *part, min(first, count), min(last, count))


@declare(  # type: ignore[untyped-decorator]
    "i8(i8[::1], i8, b1, b1, i4[:,::1], i8[::1], i8[:,::1], i4[:,:,::1], f4[:,:,::1], i8[::1], i8[::1])"
)
def send(
    links: Any,
    layer: Any,
    gives_way: Any,
    written: Any,
    x: Any,
    counts: Any,
    rows: Any,
    slots: Any,
    weights: Any,
    numbers: Any,
    sent: Any,
) -> Any:
    """Send each shard its rows, as far as the system takes them at once.

    Args:
        links: `[X]`, addresses of the links' fields.
        written: whether all rows were given to `write`.
        x: `[T, W]`.
        counts: `[X]`; see `router.plan.StackedPlan`, likewise `rows`, `slots` and `weights`.
        numbers: `[X]`, written: of the calls, -1 where there is none.
        sent: `[X]`, written: bytes, UNSENT, or `router.wire_cpu.LOST`.

    Returns: how many shards were not sent all of theirs, or TOO_MANY_ROWS.
    """
    numbers[:], sent[:] = -1, UNSENT
    for shard in range(len(links)):
        if counts[shard] > _fields(links[shard])[MAX_ROWS]:
            return TOO_MANY_ROWS
    num_left = 0
    for shard in range(len(links)):
        count = counts[shard]
        if count == 0:
            continue
        link = _fields(links[shard])
        number, frame = link[NUM_CALLS], _next_frame(link)
        if len(frame) == 0:
            num_left += 1
            continue
        if not written:
            write_call(frame, x, rows[shard, :count], slots[shard, :count], weights[shard, :count], 0, count)
        flags = SHARED * link[SHARES] + GIVES_WAY * (gives_way and link[WITHIN_HOST] != 0)
        shape = count, x.shape[1], slots.shape[2]
        sent[shard] = send_call(types.int32(link[FD]), frame, link[EPOCH], number, layer, flags, *shape)
        if sent[shard] >= 0:
            numbers[shard], link[NUM_CALLS] = number, number + 1
        if sent[shard] < call_bytes(*shape, flags):
            num_left += 1
    return num_left


@declare("i8(i8[::1], i8[::1], i8[::1])")  # type: ignore[untyped-decorator]
def wait(links: Any, numbers: Any, status: Any) -> Any:
    """Until the replies to these calls have come.

    Args:
        status: `[X]`, written: what each wait ended with, OK where there was none.

    Returns: the first shard of which none came, or `X`.
    """
    status[:] = OK
    for shard in range(len(links)):
        if numbers[shard] >= 0:
            link = _fields(links[shard])
            status[shard] = receive(link[FD], _inbox(link), link[:STATE_FIELDS], numbers[shard], link[TIMEOUT_MS])
            if status[shard] != OK:
                return shard
    return len(links)


@declare("i8(i8[::1], i8[::1], i8[::1], i8[:,::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def add(links: Any, numbers: Any, counts: Any, rows: Any, y: Any, first: Any, last: Any) -> Any:
    """Add fp32 replies, all of which have come, to the tokens `first … last - 1` of `y` `[T, H]`, shard by shard.

    Returns: the first shard whose reply is another than was expected, and which was not added, or `X`.
    """
    for shard in range(len(links)):
        number = numbers[shard]
        if number < 0:
            continue
        link = _fields(links[shard])
        frame = _inbox(link)[number % OPEN_ROUNDS]
        address = link[REPLIES + number % OPEN_ROUNDS]
        shared = _frame(address, link[FRAME_WORDS] if address != 0 else 0)
        if not add_reply(frame, shared, link[EPOCH], number, rows[shard, : counts[shard]], y, first, last):
            return shard
    return len(links)


@declare("i8(i8[::1], i8[::1], i8[::1], i8[::1], i8[:,::1], f4[:,::1])")  # type: ignore[untyped-decorator]
def wait_and_add(links: Any, numbers: Any, status: Any, counts: Any, rows: Any, y: Any) -> Any:
    """Both, for all tokens. Returns: the first shard whose reply was not added, or `X`; `status` tells which it was."""
    shard = wait(links, numbers, status)
    if shard < len(links):
        return shard
    return add(links, numbers, counts, rows, y, 0, len(y))
