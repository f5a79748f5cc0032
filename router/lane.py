"""A lane over gloo: one attention worker and every expert shard, joined by one link each.

A link is a process group of two. Shards come and go while a lane is in use, and the loss of one breaks no other link:
the next epoch's lane is made of the links that remain and those formed beside them. Dispatch and combine are an
all-to-all of grouped sends and receives, which gloo does five times faster than its own `alltoall`. Shards that get no
row are left out of a round; nobody waits for them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch

from octet.errors import ExpertMissingError, LaneError, RequestLimitError
from octet.ids import Epoch
from router.exchange import Call, Ticket
from router.frames import HEADER_BYTES, FrameBuffer, FrameLayout, Header, Kind
from router.group import Group, Transfer
from router.plan import DispatchPlan, ShardArrays

OPEN_ROUNDS = 2
"""Rounds that may be under way at once: two micro-batches take turns."""

WORKER, SHARD = 0, 1
"""Ranks of a link."""

_CLOSE_S = 2.0
"""How long a goodbye may take; a shard that does not read will see the connection break."""


class Link:
    """The attention worker's connection to one shard, with the buffers of the frames on their way over it."""

    def __init__(self, group: Group, layout: FrameLayout, epoch: Epoch) -> None:
        """
        Args:
            epoch: the one in which the link was formed. All its frames carry it, whatever epochs it lives to see.
        """
        self._group, self._layout, self._epoch = group, layout, epoch
        # Compiled now, or loaded from where it was compiled before, so that no request waits for it.
        frames_cpu()
        self._calls = [FrameBuffer(layout) for _ in range(OPEN_ROUNDS)]
        self._replies = [FrameBuffer(layout) for _ in range(OPEN_ROUNDS)]
        self._transfers: list[list[Transfer]] = [[] for _ in range(OPEN_ROUNDS)]

    def write(self, sequence: int, layer: int, x_TH: torch.Tensor, part: ShardArrays) -> None:
        """A call's frame, into the buffer of its turn. Raises: LaneError, RequestLimitError."""
        turn, num_rows = sequence % OPEN_ROUNDS, len(part[0])
        self._layout.check(num_rows)
        # Of a step that failed, a reply may be under way that nobody received.
        transfers, self._transfers[turn] = self._transfers[turn], []
        for transfer in transfers:
            transfer.wait()
        buffer = self._calls[turn]
        Header(
            kind=Kind.CALL,
            epoch=self._epoch,
            sequence=sequence,
            layer=layer,
            num_rows=num_rows,
            payload_bytes=self._layout.call_bytes(num_rows) - HEADER_BYTES,
        ).write(buffer.memory)
        frames_cpu().write_rows(x_TH.view(torch.int32).numpy(), *part, buffer.words, buffer.numbers)

    def send(self, sequence: int, num_rows: int) -> None:
        """Send the frame that was written. Raises: LaneError."""
        turn = sequence % OPEN_ROUNDS
        frame = self._calls[turn].bytes[: self._layout.call_bytes(num_rows)]
        self._transfers[turn] = [self._group.send(frame, SHARD)]

    def expect(self, sequence: int, num_rows: int) -> None:
        """Make ready for the reply. Raises: LaneError."""
        turn = sequence % OPEN_ROUNDS
        room = self._replies[turn].bytes[: self._layout.reply_bytes(num_rows)]
        self._transfers[turn].append(self._group.receive(room, SHARD))

    def receive(self, sequence: int, rows_U: npt.NDArray[np.int64], y_TH: torch.Tensor) -> None:
        """Add the reply to the tokens that were sent.

        Raises: ExpertMissingError with the shard's words if it refused; LaneError.
        """
        turn = sequence % OPEN_ROUNDS
        self._transfers[turn].pop().wait()
        buffer = self._replies[turn]
        header = Header.read(buffer.memory, self._epoch)
        if header.sequence != sequence:
            raise LaneError(f"it answered frame {header.sequence}, expected {sequence}")
        if header.kind is Kind.REFUSAL:
            text = bytes(buffer.memory[HEADER_BYTES : HEADER_BYTES + header.payload_bytes])
            raise ExpertMissingError(text.decode(errors="replace"))
        if self._layout.dtype == torch.float32:
            frames_cpu().add_rows(buffer.numbers, rows_U, y_TH.numpy())
        else:
            y_TH.index_add_(0, torch.from_numpy(rows_U), buffer.reply(len(rows_U)).float())

    def announce(self, kind: Kind, timeout_s: float | None = None) -> None:
        """Send a frame without rows. Raises: LaneError."""
        frame = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        Header(kind=kind, epoch=self._epoch).write(frame)
        self._group.send(frame, SHARD).wait(timeout_s)

    def close(self) -> None:
        """Tell the shard, and break the connection. Idempotent."""
        try:
            self.announce(Kind.CLOSE, _CLOSE_S)
        except LaneError:
            # A shard that is gone already needs no telling.
            return
        finally:
            self._group.abort()


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """One dispatch under way."""

    layer: int
    sequence: int
    rows: dict[int, npt.NDArray[np.int64]]
    """The tokens `[U]` sent, by shard."""
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
        self._open: collections.deque[_Round] = collections.deque()
        self._sequence = 0

    @property
    def num_shards(self) -> int:
        return len(self._links)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        started = _Round(layer, self._sequence, {}, {})
        # All are written before one is sent: a frame over the limit leaves no round half sent.
        for shard, link in enumerate(self._links):
            if (part := plan.arrays_of(shard)) is not None:
                started.rows[shard] = part[0]
                try:
                    link.write(self._sequence, layer, x_TH, part)
                except RequestLimitError:
                    raise
                except LaneError as error:
                    started.broken[shard] = _anew(error)
        # Shards start at once; there is time to make ready for their replies while they compute.
        for act in (Link.send, Link.expect):
            for shard, rows_U in started.rows.items():
                if shard not in started.broken:
                    try:
                        act(self._links[shard], self._sequence, len(rows_U))
                    except LaneError as error:
                        started.broken[shard] = _anew(error)
        self._open.append(started)
        self._sequence += 1
        return started

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        _raise_first(current.broken)
        refusals: list[str] = []
        for shard, rows_U in current.rows.items():
            try:
                self._links[shard].receive(current.sequence, rows_U, y_TH)
            except ExpertMissingError as error:
                refusals.append(f"shard {shard}: {error}")
            except LaneError as error:
                _raise_first({shard: error})
        if refusals:
            raise ExpertMissingError("; ".join(refusals))

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
    """A shard's end. One thread receives, another may reply."""

    def __init__(self, group: Group, layout: FrameLayout, epoch: Epoch, timeout_s: float) -> None:
        """
        Args:
            timeout_s: silence after which the attention worker is given up; it sends heartbeats more often than that.
        """
        self._group, self._layout, self._epoch, self._timeout_s = group, layout, epoch, timeout_s
        # Gloo sends when it knows of the receive. As many as there may be rounds are posted ahead, so that none is
        # posted between a frame and its reply; as many more are being answered.
        self._buffers = [FrameBuffer(layout) for _ in range(2 * OPEN_ROUNDS)]
        self._posted = collections.deque(group.receive(buffer.bytes, WORKER) for buffer in self._buffers[:OPEN_ROUNDS])
        self._turn = 0
        self._replies = [FrameBuffer(layout) for _ in range(OPEN_ROUNDS)]
        self._sent: list[Transfer | None] = [None] * OPEN_ROUNDS

    def receive(self) -> Call | None:
        while True:
            if len(self._posted) < OPEN_ROUNDS:
                following = self._buffers[(self._turn + len(self._posted)) % len(self._buffers)]
                self._posted.append(self._group.receive(following.bytes, WORKER))
            self._posted.popleft().wait(self._timeout_s)
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            header = Header.read(buffer.memory, self._epoch)
            if header.kind is Kind.CLOSE:
                return None
            if header.kind is Kind.CALL:
                rows, room_UH = buffer.rows(header.num_rows), self._free(header.sequence).reply(header.num_rows)
                return Call(layer=header.layer, rows=rows, sequence=header.sequence, room_UH=room_UH)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        num_rows = len(y_UH)
        if y_UH is not call.room_UH:
            self._free(call.sequence).reply(num_rows).copy_(y_UH)
        self._post(call, Kind.REPLY, num_rows, self._layout.reply_bytes(num_rows))

    def refuse(self, call: Call, error: Exception) -> None:
        buffer = self._free(call.sequence)
        room = self._layout.reply_bytes(len(call.rows.x_UH)) - HEADER_BYTES
        text = str(error).encode()[:room]
        buffer.memory[HEADER_BYTES : HEADER_BYTES + len(text)] = text
        self._post(call, Kind.REFUSAL, 0, HEADER_BYTES + len(text))

    def close(self) -> None:
        self._group.abort()

    def _free(self, sequence: int) -> FrameBuffer:
        """The reply's buffer, whose last content is sent."""
        turn = sequence % OPEN_ROUNDS
        sent, self._sent[turn] = self._sent[turn], None
        if sent is not None:
            sent.wait()
        return self._replies[turn]

    def _post(self, call: Call, kind: Kind, num_rows: int, size: int) -> None:
        turn = call.sequence % OPEN_ROUNDS
        buffer = self._replies[turn]
        Header(
            kind=kind,
            epoch=self._epoch,
            sequence=call.sequence,
            layer=call.layer,
            num_rows=num_rows,
            payload_bytes=size - HEADER_BYTES,
        ).write(buffer.memory)
        self._sent[turn] = self._group.send(buffer.bytes[:size], WORKER)


@functools.cache
def frames_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.frames_cpu")
