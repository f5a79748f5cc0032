"""Frames over a connected TCP socket, in compiled calls: no interpreter and no other thread between a frame and the
thread that waits for it.

The system's calls are named as they are in libc. Nothing here reads `errno`: what a failed call means, `poll` tells.

Shapes: `R` frames received at once, `W` 32-bit words of a frame. The first 16 words are the header, eight int64; see
`router.frames`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from model.vectors_cpu import compiled, declare

OK, LOST, TIMED_OUT, NO_FRAME = 0, -1, -2, -3
"""What a call ended with: done; the peer is gone; it was silent for too long; what came is no frame, or too long."""

COUNT, HAVE = 0, 1
"""The state of an inbox: frames that are complete, and bytes of the one after them."""
STATE_FIELDS = 2

HEADER_BYTES, PAYLOAD_FIELD, KIND_FIELD = 64, 6, 1

_POLLIN, _POLLOUT, _POLLERR, _POLLHUP, _POLLNVAL = 1, 4, 8, 16, 32
_GONE = _POLLERR | _POLLHUP | _POLLNVAL
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000

_intrinsic: Any = intrinsic
# Addresses are passed as the integers that they are.
_recv: Any = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_send: Any = types.ExternalFunction("send", types.int64(types.int32, types.int64, types.int64, types.int32))
_poll: Any = types.ExternalFunction("poll", types.int32(types.int64, types.int64, types.int32))


@_intrinsic  # type: ignore[untyped-decorator]
def _address(typing_context: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, context.get_value_type(types.int64))

    return types.int64(array), generate


@compiled  # type: ignore[untyped-decorator]
def _field(frames: Any, row: Any, field: Any) -> Any:
    return frames[row, 2 * field : 2 * field + 2].view(np.int64)[0]


@compiled  # type: ignore[untyped-decorator]
def _ready(fd: Any, events: Any, timeout_ms: Any) -> Any:
    """Which of the events there are, and of those that are always told; 0 if none came in time."""
    # A `struct pollfd`, whose second word is what is asked for and, above it, what there is.
    asked = np.empty(2, np.int32)
    asked[0], asked[1] = fd, events
    count = _poll(_address(asked), 1, types.int32(timeout_ms))
    while count < 0:
        # A signal came.
        asked[1] = events
        count = _poll(_address(asked), 1, types.int32(timeout_ms))
    return (asked[1] >> 16) & 0xFFFF


@compiled  # type: ignore[untyped-decorator]
def _take(fd: Any, frames: Any, state: Any) -> Any:
    """Read what has come of the next frame. Returns: 1 if it is complete, 0 if more has to come, or what went wrong."""
    row, room = state[COUNT] % len(frames), 4 * frames.shape[1]
    start = _address(frames) + row * room
    while True:
        size = np.int64(HEADER_BYTES)
        if state[HAVE] >= HEADER_BYTES:
            size += _field(frames, row, PAYLOAD_FIELD)
            if size < HEADER_BYTES or size > room:
                return NO_FRAME
            if state[HAVE] == size:
                state[COUNT] += 1
                state[HAVE] = 0
                return 1
        count = _recv(types.int32(fd), start + state[HAVE], size - state[HAVE], types.int32(_MSG_DONTWAIT))
        if count <= 0:
            return LOST if count == 0 else 0
        state[HAVE] += count


@declare("i8(i4, i4[::1], i8, i8)")  # type: ignore[untyped-decorator]
def send_now(fd: Any, frame: Any, begin: Any, size: Any) -> Any:
    """Send bytes `begin … size - 1` of a frame as far as the system takes them at once.

    Returns: bytes of the frame that are sent now, or LOST.
    """
    start, sent = _address(frame), begin
    while sent < size:
        count = _send(types.int32(fd), start + sent, size - sent, types.int32(_MSG_DONTWAIT | _MSG_NOSIGNAL))
        if count < 0:
            return LOST if _ready(fd, _POLLOUT, 0) & _GONE else sent
        sent += count
    return sent


@declare("i8(i4, i4[::1], i8, i8, i8)")  # type: ignore[untyped-decorator]
def send_rest(fd: Any, frame: Any, begin: Any, size: Any, timeout_ms: Any) -> Any:
    """The same, waiting until all is sent. Returns: OK, LOST or TIMED_OUT."""
    sent = send_now(fd, frame, begin, size)
    while 0 <= sent < size:
        events = _ready(fd, _POLLOUT, timeout_ms)
        if events == 0:
            return TIMED_OUT
        if events & _GONE:
            return LOST
        sent = send_now(fd, frame, sent, size)
    return OK if sent == size else LOST


@declare("i8(i4, i4[:,::1], i8[::1], i8, i8)")  # type: ignore[untyped-decorator]
def receive(fd: Any, frames: Any, state: Any, number: Any, timeout_ms: Any) -> Any:
    """Wait until frame `number`, counted from 0, is complete in row `number % R`.

    Args:
        frames: `[R, W]`; frames after it may arrive in the other rows meanwhile, but are not waited for.
        state: see COUNT and HAVE.
        timeout_ms: of silence.
    """
    while state[COUNT] <= number:
        arrived = _take(fd, frames, state)
        if arrived < 0:
            return arrived
        if arrived > 0:
            continue
        events = _ready(fd, _POLLIN, timeout_ms)
        if events == 0:
            return TIMED_OUT
        if events & _GONE and state[COUNT] <= number:
            # What it sent before it went is read first.
            arrived = _take(fd, frames, state)
            if arrived <= 0:
                return LOST if arrived == 0 else arrived
    return OK


@declare("i8(i4, i4[:,::1], i8[::1], i8, i8)")  # type: ignore[untyped-decorator]
def receive_any_but(fd: Any, frames: Any, state: Any, kind: Any, timeout_ms: Any) -> Any:
    """Wait for the next frame that is not of this kind; those that are leave no trace.

    Returns: its row, or a negative number.
    """
    while True:
        number = state[COUNT]
        status = receive(fd, frames, state, number, timeout_ms)
        if status != OK:
            return status
        row = number % len(frames)
        if _field(frames, row, KIND_FIELD) != kind:
            return row
        state[COUNT] = number
