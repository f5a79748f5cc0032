"""A lane on CPUs: one attention worker and every expert shard, joined by one link each.

A link is a wire of its own. Shards come and go while a lane is in use, and the loss of one breaks no other link: the
next epoch's lane is made of the links that remain and those formed beside them. Shards that get no row are left out of
a round; nobody waits for them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from octet.errors import ExpertMissingError, LaneError, LaneTimeoutError
from octet.ids import Epoch
from router.exchange import Call, Ticket
from router.frames import GIVES_WAY, HEADER_BYTES, SHARED, FrameBuffer, FrameLayout, Header, Kind, new_frames
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.plan import DispatchPlan, ShardArrays
from router.wire import Wire, milliseconds, wire_cpu

OPEN_ROUNDS = 2
"""Rounds that may be under way at once: two micro-batches take turns."""

WORKER, SHARD = HOST_SIDE, GUEST_SIDE
"""Ranks of a link's wire."""

_NO_WORDS = np.empty(0, np.int32)
_HEARTBEAT, _REPLY, _REFUSAL = Kind.HEARTBEAT.value, Kind.REPLY.value, Kind.REFUSAL.value

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
        self._frames_cpu, self._wire_cpu = frames_cpu(), wire_cpu()
        self._inbox = new_frames(layout, OPEN_ROUNDS)
        shared = shared_frames(wire, layout)
        self._shares = shared is not None
        if shared is None:
            call = new_frames(layout, 1)[0]
            self._calls, self._shared_replies = [call] * OPEN_ROUNDS, [_NO_WORDS] * OPEN_ROUNDS
        else:
            self._calls, self._shared_replies = list(shared.calls), list(shared.replies)
        self._state = np.zeros(self._wire_cpu.STATE_FIELDS, np.int64)
        self._num_calls, self._timeout_ms = 0, milliseconds(wire.timeout_s)
        self._rest: _Rest | None = None

    def check(self, num_rows: int) -> None:
        """Raises: RequestLimitError if a frame has no room for so many."""
        self._layout.check(num_rows)

    def send(self, layer: int, x_TW: npt.NDArray[np.int32], part: ShardArrays, gives_way: bool = False) -> int:
        """Send a shard's rows, as words. Returns: the call's number. Raises: LaneError."""
        self._finish(self._wire.timeout_s)
        # A shard on another machine has cores of its own.
        flags = GIVES_WAY * (gives_way and self._wire.within_host) + SHARED * self._shares
        number = self._num_calls
        if self._state[self._wire_cpu.COUNT] <= number - OPEN_ROUNDS:
            # Of a step that failed: nobody has received it, and its room is wanted.
            self._wait(number - OPEN_ROUNDS)
        frame = self._calls[number % OPEN_ROUNDS]
        sent = self._frames_cpu.send_call(self._wire.fd, frame, self._epoch, number, layer, flags, x_TW, *part)
        self._wire.check(sent, 0)
        self._num_calls += 1
        size = HEADER_BYTES if self._shares else self._layout.call_bytes(len(part[0]))
        if sent < size:
            self._rest = _Rest(self._wire, frame, sent, size)
        return number

    def receive(self, number: int, rows_U: npt.NDArray[np.int64], y_TH: torch.Tensor) -> None:
        """Add the reply to a call to the tokens that were sent.

        Raises: ExpertMissingError with the shard's words if it refused; LaneError.
        """
        self._wait(number)
        frame, shared = self._inbox[number % OPEN_ROUNDS], self._shared_replies[number % OPEN_ROUNDS]
        if self._layout.dtype == torch.float32 and self._frames_cpu.add_reply(
            frame, shared, self._epoch, number, rows_U, y_TH.numpy()
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """One dispatch under way."""

    layer: int
    calls: dict[int, tuple[int, npt.NDArray[np.int64]]]
    """By shard: the number of its link's call, and the tokens `[U]` sent."""
    broken: dict[int, LaneError]
    """Shards to which nothing could be sent."""


class LaneExchange:
    """The attention worker's end. Belongs to one thread.

    The loss of a shard is raised when its reply is to be received, and leaves the links to the others in order: a lane
    of the next epoch is made of them.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        """
        Args:
            links: one per shard, in the order of the placement's.
        """
        self._links = tuple(links)
        self.gives_way = False
        self._open: collections.deque[_Round] = collections.deque()

    @property
    def num_shards(self) -> int:
        return len(self._links)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        parts = [(shard, part) for shard in range(len(self._links)) if (part := plan.arrays_of(shard)) is not None]
        # All are checked before one is sent: a frame over the limit leaves no round half sent.
        for shard, part in parts:
            self._links[shard].check(len(part[0]))
        started, x_TW = _Round(layer, {}, {}), x_TH.view(torch.int32).numpy()
        for shard, part in parts:
            try:
                started.calls[shard] = self._links[shard].send(layer, x_TW, part, self.gives_way), part[0]
            except LaneError as error:
                started.broken[shard] = _anew(error)
        self._open.append(started)
        return started

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        _raise_first(current.broken)
        refusals: list[str] = []
        for shard, (number, rows_U) in current.calls.items():
            try:
                self._links[shard].receive(number, rows_U, y_TH)
            except ExpertMissingError as error:
                refusals.append(f"shard {shard}: {error}")
            except LaneError as error:
                _raise_first({shard: error})
        if refusals:
            raise ExpertMissingError("; ".join(refusals))

    def settle(self) -> None:
        return

    def heartbeat(self) -> None:
        broken: dict[int, LaneError] = {}
        for shard, link in enumerate(self._links):
            try:
                link.announce(Kind.HEARTBEAT)
            except LaneError as error:
                broken[shard] = _anew(error)
        _raise_first(broken)

    def close(self) -> None:
        """Tell every shard, and break the connections."""
        for link in self._links:
            link.close()


def _anew(error: LaneError) -> LaneError:
    """The same without its traceback, which would hold the links and their ports until the next garbage collection, and
    an idle worker seldom has one."""
    return type(error)(str(error))


def _raise_first(broken: Mapping[int, LaneError]) -> None:
    for shard, error in broken.items():
        raise type(error)(f"shard {shard}: {error}") from error


class LanePort:
    """A shard's end. One thread receives and replies."""

    def __init__(self, wire: Wire, layout: FrameLayout, epoch: Epoch, timeout_s: float) -> None:
        """
        Args:
            timeout_s: silence after which the attention worker is given up; it sends heartbeats more often than that.
        """
        self._wire, self._layout, self._epoch, self._timeout_s = wire, layout, epoch, timeout_s
        self._frames_cpu, self._wire_cpu = frames_cpu(), wire_cpu()
        self._inbox, self._outbox = new_frames(layout, OPEN_ROUNDS), new_frames(layout, OPEN_ROUNDS)
        self._calls = [FrameBuffer(layout, words) for words in self._inbox]
        shared = shared_frames(wire, layout)
        self._shares = shared is not None
        self._shared_calls = [] if shared is None else [FrameBuffer(layout, words) for words in shared.calls]
        self._replies = [FrameBuffer(layout, words) for words in (self._outbox if shared is None else shared.replies)]
        self._state, self._timeout_ms = np.zeros(self._wire_cpu.STATE_FIELDS, np.int64), milliseconds(timeout_s)
        self._unsent: tuple[npt.NDArray[np.int32], int, int] | None = None

    def receive(self) -> Call | None:
        # The worker may not have read all of the last reply yet. Now nobody waits for this thread's turn to end.
        self._send_rest()
        row = self._wire_cpu.receive_any_but(self._wire.fd, self._inbox, self._state, _HEARTBEAT, self._timeout_ms)
        self._wire.check(row, self._timeout_s)
        header = Header.read(self._calls[row].memory, self._epoch)
        if header.kind is Kind.CLOSE:
            return None
        self._layout.check_call(header, self._shares)
        num_rows, turn = header.num_rows, header.sequence % OPEN_ROUNDS
        frame, room_UH = (
            self._shared_calls[turn] if header.shared else self._calls[row],
            self._replies[turn].reply(num_rows),
        )
        return Call(header.layer, frame.rows(num_rows), header.sequence, room_UH, header.gives_way)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        """Does not wait until the other end has read it."""
        num_rows = y_UH.shape[0]
        if y_UH is not call.room_UH:
            self._replies[call.sequence % OPEN_ROUNDS].reply(num_rows).copy_(y_UH)
        if self._shares:
            self._send(call, _REPLY, num_rows, HEADER_BYTES, SHARED)
        else:
            self._send(call, _REPLY, num_rows, self._layout.reply_bytes(num_rows), 0)

    def refuse(self, call: Call, error: Exception) -> None:
        room = self._layout.reply_bytes(len(call.rows.x_UH)) - HEADER_BYTES
        text = str(error).encode()[:room]
        self._outbox[call.sequence % OPEN_ROUNDS].view(np.uint8).data[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        self._send(call, _REFUSAL, 0, HEADER_BYTES + len(text), 0)

    def close(self) -> None:
        self._wire.abort()

    def _send(self, call: Call, kind: int, num_rows: int, size: int, flags: int) -> None:
        self._send_rest()
        frame = self._outbox[call.sequence % OPEN_ROUNDS]
        sent = self._frames_cpu.send_reply(
            self._wire.fd, frame, kind, self._epoch, call.sequence, call.layer, num_rows, size, flags
        )
        self._wire.check(sent, 0)
        if sent < size:
            self._unsent = frame, sent, size

    def _send_rest(self) -> None:
        """What there is of the last reply. Raises: LaneError."""
        if self._unsent is not None:
            status = self._wire_cpu.send_rest(self._wire.fd, *self._unsent, milliseconds(self._wire.timeout_s))
            self._wire.check(status, self._wire.timeout_s)
            self._unsent = None


@functools.cache
def frames_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.frames_cpu")
