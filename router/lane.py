"""A lane over gloo: one attention worker and every expert shard, joined by one link each.

A link is a process group of two. Shards come and go while a lane is in use, and the loss of one breaks no other link:
the next epoch's lane is made of the links that remain and those formed beside them. Dispatch and combine are an
all-to-all of grouped sends and receives, which gloo does five times faster than its own `alltoall`. Shards that get no
row are left out of a round; nobody waits for them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from octet.errors import ExpertMissingError, LaneError, RequestLimitError
from octet.ids import Epoch
from router.exchange import Call, ExpertRows, Ticket
from router.frames import HEADER_BYTES, FrameLayout, Header, Kind
from router.group import Group, Transfer

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
        self._calls = [layout.new_buffer() for _ in range(OPEN_ROUNDS)]
        self._replies = [layout.new_buffer() for _ in range(OPEN_ROUNDS)]
        self._transfers: list[list[Transfer]] = [[] for _ in range(OPEN_ROUNDS)]

    def write(self, sequence: int, layer: int, rows: ExpertRows) -> torch.Tensor:
        """The frame of a call, in the buffer of its turn. Raises: LaneError, RequestLimitError."""
        turn = sequence % OPEN_ROUNDS
        # Of a step that failed, a reply may be under way that nobody received.
        transfers, self._transfers[turn] = self._transfers[turn], []
        for transfer in transfers:
            transfer.wait()
        return self._layout.write_call(self._calls[turn], self._epoch, sequence, layer, rows)

    def send(self, sequence: int, frame: torch.Tensor, num_rows: int) -> None:
        """Send a written frame, and expect its reply. Raises: LaneError."""
        turn = sequence % OPEN_ROUNDS
        reply = self._group.receive(self._replies[turn][: self._layout.reply_bytes(num_rows)], SHARD)
        self._transfers[turn] = [reply, self._group.send(frame, SHARD)]

    def receive(self, sequence: int, num_rows: int) -> torch.Tensor:
        """The payload `[U, H]` of the reply.

        Raises: ExpertMissingError with the shard's words if it refused; LaneError.
        """
        turn = sequence % OPEN_ROUNDS
        self._transfers[turn].pop(0).wait()
        buffer = self._replies[turn]
        header = Header.read(buffer, self._epoch)
        if header.sequence != sequence:
            raise LaneError(f"it answered frame {header.sequence}, expected {sequence}")
        if header.kind is Kind.REFUSAL:
            text = buffer[HEADER_BYTES : HEADER_BYTES + header.payload_bytes].numpy().tobytes()
            raise ExpertMissingError(text.decode(errors="replace"))
        return self._layout.reply(buffer, num_rows)

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
    num_rows: dict[int, int]
    """By shard, where any were sent."""
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

    def send(self, layer: int, rows: Sequence[ExpertRows | None]) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        broken: dict[int, LaneError] = {}
        frames: dict[int, torch.Tensor] = {}
        # All are written before one is sent: a frame over the limit leaves no round half sent.
        for shard, part in enumerate(rows):
            if part is not None:
                with _noting(broken, shard):
                    frames[shard] = self._links[shard].write(self._sequence, layer, part)
        num_rows = {shard: len(part.x_UH) for shard, part in enumerate(rows) if part is not None}
        for shard, frame in frames.items():
            with _noting(broken, shard):
                self._links[shard].send(self._sequence, frame, num_rows[shard])
        started = _Round(layer, self._sequence, num_rows, broken)
        self._open.append(started)
        self._sequence += 1
        return started

    def receive(self, ticket: Ticket) -> list[torch.Tensor | None]:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        _raise_first(current.broken)
        payloads: list[torch.Tensor | None] = [None] * len(self._links)
        refusals: list[str] = []
        for shard, num in current.num_rows.items():
            try:
                payloads[shard] = self._links[shard].receive(current.sequence, num)
            except ExpertMissingError as error:
                refusals.append(f"shard {shard}: {error}")
            except LaneError as error:
                _raise_first({shard: error})
        if refusals:
            raise ExpertMissingError("; ".join(refusals))
        return payloads

    def heartbeat(self) -> None:
        broken: dict[int, LaneError] = {}
        for shard, link in enumerate(self._links):
            with _noting(broken, shard):
                link.announce(Kind.HEARTBEAT)
        _raise_first(broken)

    def close(self) -> None:
        """Tell every shard, and break the connections."""
        for link in self._links:
            link.close()


@contextlib.contextmanager
def _noting(broken: dict[int, LaneError], shard: int) -> Iterator[None]:
    """Note that a link is broken, so that the round goes on with the others."""
    try:
        yield
    except RequestLimitError:
        raise
    except LaneError as error:
        # Anew, without a traceback: it would hold the frame that holds `broken`, and with it the links and their ports
        # until the next garbage collection, which an idle worker seldom has.
        broken[shard] = type(error)(str(error))


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
        # One more than the rounds under way: a frame is received while the others are computed.
        self._buffers = [layout.new_buffer() for _ in range(OPEN_ROUNDS + 1)]
        self._turn = 0
        self._posted = group.receive(self._buffers[0], WORKER)
        self._reply = layout.new_buffer()
        self._sent: Transfer | None = None

    def receive(self) -> Call | None:
        while True:
            buffer = self._buffers[self._turn]
            self._posted.wait(self._timeout_s)
            header = Header.read(buffer, self._epoch)
            if header.kind is Kind.CLOSE:
                return None
            # Gloo sends when it knows of the receive, so the next one is posted before this frame is computed.
            self._turn = (self._turn + 1) % len(self._buffers)
            self._posted = self._group.receive(self._buffers[self._turn], WORKER)
            if header.kind is Kind.CALL:
                rows = self._layout.rows(buffer, header.num_rows)
                return Call(layer=header.layer, rows=rows, sequence=header.sequence)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        buffer, num_rows = self._free_reply(), len(y_UH)
        size = self._layout.reply_bytes(num_rows)
        self._layout.reply(buffer, num_rows).copy_(y_UH)
        self._post(call, Kind.REPLY, num_rows, size)

    def refuse(self, call: Call, error: Exception) -> None:
        buffer = self._free_reply()
        room = self._layout.reply_bytes(len(call.rows.x_UH)) - HEADER_BYTES
        text = str(error).encode()[:room]
        buffer[HEADER_BYTES : HEADER_BYTES + len(text)] = torch.tensor(list(text), dtype=torch.uint8)
        self._post(call, Kind.REFUSAL, 0, HEADER_BYTES + len(text))

    def close(self) -> None:
        self._group.abort()

    def _free_reply(self) -> torch.Tensor:
        if self._sent is not None:
            self._sent.wait()
        return self._reply

    def _post(self, call: Call, kind: Kind, num_rows: int, size: int) -> None:
        Header(
            kind=kind,
            epoch=self._epoch,
            sequence=call.sequence,
            layer=call.layer,
            num_rows=num_rows,
            payload_bytes=size - HEADER_BYTES,
        ).write(self._reply)
        self._sent = self._group.send(self._reply[:size], WORKER)
