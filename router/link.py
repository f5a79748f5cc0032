"""A link of a lane: an attention worker's connection to one expert shard, with the frames on their way over it."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import threading
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from octet.errors import ExpertMissingError, LaneError, LaneTimeoutError
from octet.ids import Epoch
from router.frames import (
    GIVES_WAY,
    HEADER_BYTES,
    OPEN_ROUNDS,
    SHARED,
    FrameBuffer,
    FrameLayout,
    Header,
    Kind,
    new_frames,
)
from router.plan import ShardArrays
from router.wire import Wire, milliseconds, wire_cpu

_NO_WORDS = np.empty(0, np.int32)

_CLOSE_S = 2.0
"""How long a goodbye may take; a shard that does not read will see the connection break."""


@dataclasses.dataclass(frozen=True, slots=True)
class SharedFrames:
    """The frames of a lane in memory that both ends have. A call and its reply are in those of its number: there are as
    many as rounds may be under way, so that nobody writes what the other end still reads."""

    calls: npt.NDArray[np.int32]
    replies: npt.NDArray[np.int32]


def shared_bytes(layout: FrameLayout) -> int:
    """What `Wire.join` is to be asked for."""
    return 2 * OPEN_ROUNDS * layout.frame_bytes


def shared_frames(wire: Wire, layout: FrameLayout) -> SharedFrames | None:
    """None if the wire has no memory for them. Raises: LaneError if it has another size."""
    if wire.shared is None:
        return None
    if len(wire.shared) != shared_bytes(layout):
        raise LaneError(f"{len(wire.shared)} bytes of shared memory, expected {shared_bytes(layout)}")
    frames = np.frombuffer(wire.shared, np.int32).reshape(2, OPEN_ROUNDS, -1)
    return SharedFrames(calls=frames[0], replies=frames[1])


class Link:
    """The attention worker's connection to one shard, with the buffers of the frames on their way over it.

    It numbers its calls. Replies come in the same order.
    """

    def __init__(self, wire: Wire, layout: FrameLayout, epoch: Epoch) -> None:
        """
        Args:
            epoch: the one in which the link was formed. All its frames carry it, whatever epochs it lives to see.
        """
        self._wire, self._layout, self._epoch = wire, layout, epoch
        # Compiled now, or loaded from where it was compiled before, so that no request waits for it.
        self._frames_cpu, self._wire_cpu, self._rounds_cpu = frames_cpu(), wire_cpu(), rounds_cpu()
        self._inbox = new_frames(layout, OPEN_ROUNDS)
        shared = shared_frames(wire, layout)
        self._shares = shared is not None
        if shared is None:
            call = new_frames(layout, 1)[0]
            self._calls, self._shared_replies = [call] * OPEN_ROUNDS, [_NO_WORDS] * OPEN_ROUNDS
        else:
            self._calls, self._shared_replies = list(shared.calls), list(shared.replies)
        self._timeout_ms = milliseconds(wire.timeout_s)
        self._rest: _Rest | None = None
        self.fields = self._fields()
        """All that `router.rounds_cpu` knows of it. First the state of its inbox."""
        self._state = self.fields[: self._wire_cpu.STATE_FIELDS]

    def _fields(self) -> npt.NDArray[np.int64]:
        names = self._rounds_cpu
        fields = np.zeros(names.FIELDS, np.int64)
        fields[names.FD], fields[names.EPOCH] = self._wire.fd, self._epoch
        fields[names.MAX_ROWS], fields[names.TIMEOUT_MS] = self._layout.max_rows, self._timeout_ms
        fields[names.WITHIN_HOST], fields[names.SHARES] = self._wire.within_host, self._shares
        fields[names.INBOX], fields[names.FRAME_WORDS] = self._inbox.ctypes.data, self._inbox.shape[1]
        for turn in range(OPEN_ROUNDS):
            fields[names.CALLS + turn] = self._calls[turn].ctypes.data
            fields[names.REPLIES + turn] = self._shared_replies[turn].ctypes.data if self._shares else 0
        return fields

    @property
    def fd(self) -> int:
        """Of its connection."""
        return self._wire.fd

    @property
    def within_host(self) -> bool:
        """Whether the shard is on this machine."""
        return self._wire.within_host

    @property
    def adds_compiled(self) -> bool:
        """Whether compiled code can add its replies."""
        return self._layout.dtype == torch.float32

    def check(self, num_rows: int) -> None:
        """Raises: RequestLimitError if a frame has no room for so many."""
        self._layout.check(num_rows)

    def check_status(self, status: int) -> None:
        """Raises: LaneError for what a call of `router.rounds_cpu` ended with."""
        self._wire.check(status, self._wire.timeout_s)

    def send(self, layer: int, x_TW: npt.NDArray[np.int32], part: ShardArrays, gives_way: bool = False) -> int:
        """Send a shard's rows, as words. Returns: the call's number. Raises: LaneError."""
        self._finish(self._wire.timeout_s)
        # A shard on another machine has cores of its own.
        flags = GIVES_WAY * (gives_way and self._wire.within_host) + SHARED * self._shares
        number = int(self.fields[self._rounds_cpu.NUM_CALLS])
        if self._state[self._wire_cpu.COUNT] <= number - OPEN_ROUNDS:
            # Of a step that failed: nobody has received it, and its room is wanted.
            self._wait(number - OPEN_ROUNDS)
        frame = self._calls[number % OPEN_ROUNDS]
        self._frames_cpu.write_call(frame, x_TW, *part, 0, len(part[0]))
        shape = len(part[0]), x_TW.shape[1], part[1].shape[1]
        sent = self._frames_cpu.send_call(self._wire.fd, frame, self._epoch, number, layer, flags, *shape)
        self._wire.check(sent, 0)
        self.fields[self._rounds_cpu.NUM_CALLS] += 1
        self.finish_later(number, len(part[0]), sent)
        return number

    def finish_later(self, number: int, num_rows: int, sent: int) -> None:
        """Let a thread send what the system did not take at once of the last call."""
        size = HEADER_BYTES if self._shares else self._layout.call_bytes(num_rows)
        if sent < size:
            self._rest = _Rest(self._wire, self._calls[number % OPEN_ROUNDS], sent, size)
            self.fields[self._rounds_cpu.BUSY] = 1

    def receive(self, number: int, rows_U: npt.NDArray[np.int64], y_TH: torch.Tensor) -> None:
        """Add the reply to a call to the tokens that were sent.

        Raises: ExpertMissingError with the shard's words if it refused; LaneError.
        """
        self._wait(number)
        frame, shared = self._inbox[number % OPEN_ROUNDS], self._shared_replies[number % OPEN_ROUNDS]
        if self._layout.dtype == torch.float32 and self._frames_cpu.add_reply(
            frame, shared, self._epoch, number, rows_U, y_TH.numpy(), 0, len(y_TH)
        ):
            return
        memory = frame.view(np.uint8).data
        header = Header.read(memory, self._epoch)
        if header.sequence != number:
            raise LaneError(f"it answered frame {header.sequence}, expected {number}")
        self._layout.check_reply(header, len(rows_U), self._shares)
        if header.kind is Kind.REFUSAL:
            text = bytes(memory[HEADER_BYTES : HEADER_BYTES + header.payload_bytes])
            raise ExpertMissingError(text.decode(errors="replace"))
        y_UH = FrameBuffer(self._layout, shared if header.shared else frame).reply(len(rows_U))
        y_TH.index_add_(0, torch.from_numpy(rows_U), y_UH.float())

    def announce(self, kind: Kind, timeout_s: float | None = None) -> None:
        """Send a frame without rows. Raises: LaneError."""
        timeout_s = self._wire.timeout_s if timeout_s is None else timeout_s
        self._finish(timeout_s)
        frame = np.zeros(HEADER_BYTES // 4, np.int32)
        Header(kind=kind, epoch=self._epoch).write(frame.view(np.uint8).data)
        status = self._wire_cpu.send_rest(self._wire.fd, frame, 0, HEADER_BYTES, milliseconds(timeout_s))
        self._wire.check(status, timeout_s)

    def close(self) -> None:
        """Tell the shard, and break the connection. Idempotent."""
        try:
            self.announce(Kind.CLOSE, _CLOSE_S)
        except LaneError:
            # A shard that is gone already needs no telling.
            return
        finally:
            self._wire.abort()

    def abort(self) -> None:
        """Break the connection without a word: whoever waits on it gets an error now. Any thread may call it."""
        self._wire.abort()

    def _wait(self, number: int) -> None:
        """Until the reply of this number has come. Raises: LaneError."""
        status = self._wire_cpu.receive(self._wire.fd, self._inbox, self._state, number, self._timeout_ms)
        self._wire.check(status, self._wire.timeout_s)

    def _finish(self, timeout_s: float) -> None:
        """Sending the last call, if it was too long to be sent at once. Raises: LaneError."""
        if self._rest is not None:
            self._rest.finish(timeout_s)
            self._rest = None
            self.fields[self._rounds_cpu.BUSY] = 0


class _Rest:
    """What the system did not take at once of a long frame: sent by a thread, while its sender goes on computing."""

    def __init__(self, wire: Wire, frame: npt.NDArray[np.int32], sent: int, size: int) -> None:
        self._wire, self._status = wire, 0
        self._thread = threading.Thread(target=self._send, args=(frame, sent, size), name="rest", daemon=True)
        self._thread.start()

    def _send(self, frame: npt.NDArray[np.int32], sent: int, size: int) -> None:
        timeout_ms = milliseconds(self._wire.timeout_s)
        self._status = wire_cpu().send_rest(self._wire.fd, frame, sent, size, timeout_ms)

    def finish(self, timeout_s: float) -> None:
        """Raises: LaneError."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._wire.abort()
            raise LaneTimeoutError(f"a frame was not read within {timeout_s:g} s")
        self._wire.check(self._status, self._wire.timeout_s)


@functools.cache
def frames_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.frames_cpu")


@functools.cache
def rounds_cpu() -> ModuleType:
    # Likewise.
    return importlib.import_module("router.rounds_cpu")
