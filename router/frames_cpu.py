"""Calls and replies as frames on a CPU: rows into them and on their way, and sums out of them, one compiled call each.

Frames are arrays of 32-bit words here: rows of any dtype are copied as such, and what is fp32 is added as such.

Shapes: `T` tokens, `U` rows of a frame, `W` words per row, `K` experts per token, `H` hidden.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from model.rows_cpu import add_row, copy_row
from model.vectors_cpu import address, compiled, declare
from router.frames import HEADER_BYTES, MAGIC, SHARED, Kind
from router.wire_cpu import send_now

_WORDS = HEADER_BYTES // 4
_CALL, _REPLY = Kind.CALL.value, Kind.REPLY.value


@compiled  # type: ignore[untyped-decorator]
def _write_header(
    frame: Any, kind: Any, epoch: Any, number: Any, layer: Any, num_rows: Any, size: Any, flags: Any
) -> None:
    header = frame[:_WORDS].view(np.int64)
    header[0], header[1], header[2], header[3] = MAGIC, kind, epoch, number
    header[4], header[5], header[6], header[7] = layer, num_rows, size - HEADER_BYTES, flags


@compiled  # type: ignore[untyped-decorator]
def call_bytes(num_rows: Any, width: Any, top_k: Any, flags: Any) -> Any:
    """Of what is sent of a call with these flags."""
    return HEADER_BYTES if flags & SHARED != 0 else HEADER_BYTES + 4 * num_rows * (width + 2 * top_k)


@declare("void(i4[::1], i4[:,::1], i8[::1], i4[:,::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def write_call(frame: Any, x: Any, rows: Any, slots: Any, weights: Any, first: Any, last: Any) -> None:
    """Write rows `first … last - 1` of a call's payload into `frame`.

    Args:
        x: `[T, W]`.
        rows: `[U]`, which of `x` are sent.
        slots: `[U, K]`, likewise `weights`.
    """
    num_rows, width, top_k = len(rows), x.shape[1], slots.shape[1]
    # What is copied as fp32 keeps its bits.
    payload, numbers, values = frame[_WORDS:], frame[_WORDS:].view(np.float32), x.view(np.float32)
    slots_at, weights_at = num_rows * width, num_rows * (width + top_k)
    for u in range(first, last):
        row = rows[u]
        copy_row(address(values, row * width), width, address(numbers, u * width))
        for k in range(top_k):
            payload[slots_at + u * top_k + k] = slots[u, k]
            numbers[weights_at + u * top_k + k] = weights[u, k]


@declare("i8(i4, i4[::1], i8, i8, i8, i8, i8, i8, i8)")  # type: ignore[untyped-decorator]
def send_call(
    fd: Any, frame: Any, epoch: Any, number: Any, layer: Any, flags: Any, num_rows: Any, width: Any, top_k: Any
) -> Any:
    """Send as much as the system takes at once of a call whose payload is written; if it is shared, of its header.

    Args:
        flags: of the header.
        width: words per row.

    Returns: bytes sent, or `router.wire_cpu.LOST`.
    """
    size = call_bytes(num_rows, width, top_k, flags)
    _write_header(frame, _CALL, epoch, number, layer, num_rows, size, flags)
    return send_now(fd, frame, 0, size)


@declare("i8(i4, i4[::1], i8, i8, i8, i8, i8, i8, i8)")  # type: ignore[untyped-decorator]
def send_reply(
    fd: Any, frame: Any, kind: Any, epoch: Any, number: Any, layer: Any, num_rows: Any, size: Any, flags: Any
) -> Any:
    """Send a frame whose payload is written, likewise. `size`: in bytes, of what is sent, with the header."""
    _write_header(frame, kind, epoch, number, layer, num_rows, size, flags)
    return send_now(fd, frame, 0, size)


@compiled  # type: ignore[untyped-decorator]
def _at_least(rows: Any, token: Any) -> Any:
    """How many of the rows, which ascend, are of tokens before this one."""
    low, high = 0, len(rows)
    while low < high:
        middle = (low + high) // 2
        if rows[middle] < token:
            low = middle + 1
        else:
            high = middle
    return low


@declare("b1(i4[::1], i4[::1], i8, i8, i8[::1], f4[:,::1], i8, i8)")  # type: ignore[untyped-decorator]
def add_reply(frame: Any, shared: Any, epoch: Any, number: Any, rows: Any, y: Any, first: Any, last: Any) -> Any:
    """Add an fp32 reply to the tokens it is for, as far as they are among `first … last - 1`.

    Args:
        frame: as it was received.
        shared: the frame in shared memory that has its payload if that says so; empty where there is none.
        rows: `[U]`, ascending.
        y: `[T, H]`.

    Returns: whether it is the reply to this call; else nothing was added.
    """
    num_rows, hidden = len(rows), y.shape[1]
    header = frame[:_WORDS].view(np.int64)
    if header[0] != MAGIC or header[1] != _REPLY or header[2] != epoch or header[3] != number or header[5] != num_rows:
        return False
    if header[7] & SHARED != 0:
        if header[6] != 0 or len(shared) < _WORDS + num_rows * hidden:
            return False
        payload = shared[_WORDS:].view(np.float32)
    else:
        if header[6] != 4 * num_rows * hidden:
            return False
        payload = frame[_WORDS:].view(np.float32)
    for u in range(_at_least(rows, first), _at_least(rows, last)):
        add_row(address(payload, u * hidden), hidden, address(y, rows[u] * hidden))
    return True
