"""A lane over gloo: one attention worker (rank 0) and every expert shard (ranks 1..n).

Dispatch and combine are an all-to-all of grouped sends and receives, which gloo does five times faster than its own
`alltoall`. Shards that get no row are left out of a round; nobody waits for them.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence

import torch

from octet.errors import ExpertMissingError, LaneError
from octet.ids import Epoch
from router.exchange import Call, ExpertRows, Ticket
from router.frames import HEADER_BYTES, FrameLayout, Header, Kind
from router.group import Group, Transfer

OPEN_ROUNDS = 2
"""Rounds that may be under way at once: two micro-batches take turns."""

_CLOSE_S = 2.0
"""How long a goodbye may take; a shard that does not read will see the connection break."""


class _Round:
    """One dispatch under way."""

    def __init__(self, layer: int, sequence: int, num_rows: list[int], receives: list[Transfer | None]) -> None:
        self.layer, self.sequence, self.num_rows, self.receives = layer, sequence, num_rows, receives


class LaneExchange:
    """The attention worker's end. Belongs to one thread."""

    def __init__(self, group: Group, num_shards: int, layout: FrameLayout, epoch: Epoch) -> None:
        self._group, self._num_shards, self._layout, self._epoch = group, num_shards, layout, epoch
        self._calls = [[layout.new_buffer() for _ in range(num_shards)] for _ in range(OPEN_ROUNDS)]
        self._replies = [[layout.new_buffer() for _ in range(num_shards)] for _ in range(OPEN_ROUNDS)]
        self._sends: list[list[Transfer]] = [[] for _ in range(OPEN_ROUNDS)]
        self._open: collections.deque[_Round] = collections.deque()
        self._sequence = 0

    @property
    def num_shards(self) -> int:
        return self._num_shards

    def send(self, layer: int, rows: Sequence[ExpertRows | None]) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        turn = self._sequence % OPEN_ROUNDS
        for transfer in self._sends[turn]:
            transfer.wait()
        self._sends[turn] = []
        # All are written before one is sent: a frame over the limit leaves no round half sent.
        frames = [
            None if part is None else self._layout.write_call(buffer, self._epoch, self._sequence, layer, part)
            for buffer, part in zip(self._calls[turn], rows, strict=True)
        ]
        num_rows = [0 if part is None else len(part.x_UH) for part in rows]
        receives: list[Transfer | None] = []
        for shard, frame in enumerate(frames):
            if frame is None:
                receives.append(None)
                continue
            room = self._replies[turn][shard][: self._layout.reply_bytes(num_rows[shard])]
            receives.append(self._group.receive(room, shard + 1))
            self._sends[turn].append(self._group.send(frame, shard + 1))
        started = _Round(layer, self._sequence, num_rows, receives)
        self._open.append(started)
        self._sequence += 1
        return started

    def receive(self, ticket: Ticket) -> list[torch.Tensor | None]:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        turn = current.sequence % OPEN_ROUNDS
        refusals: list[str] = []
        replies: list[torch.Tensor | None] = []
        for shard, transfer in enumerate(current.receives):
            if transfer is None:
                replies.append(None)
                continue
            try:
                transfer.wait()
            except LaneError as error:
                raise type(error)(f"shard {shard}: {error}") from error
            buffer = self._replies[turn][shard]
            header = Header.read(buffer, self._epoch)
            if header.sequence != current.sequence:
                raise LaneError(f"shard {shard} answered frame {header.sequence}, expected {current.sequence}")
            if header.kind is Kind.REFUSAL:
                text = bytes(buffer[HEADER_BYTES : HEADER_BYTES + header.payload_bytes].tolist())
                refusals.append(f"shard {shard}: {text.decode(errors='replace')}")
            replies.append(self._layout.reply(buffer, current.num_rows[shard]))
        if refusals:
            raise ExpertMissingError("; ".join(refusals))
        return replies

    def heartbeat(self) -> None:
        self._announce(Kind.HEARTBEAT, None)

    def close(self) -> None:
        """Tell every shard, and break the connections."""
        try:
            self._announce(Kind.CLOSE, _CLOSE_S)
        except LaneError:
            # A shard that is gone already needs no telling.
            return
        finally:
            self._group.abort()

    def _announce(self, kind: Kind, timeout_s: float | None) -> None:
        frame = torch.empty(HEADER_BYTES, dtype=torch.uint8)
        Header(kind=kind, epoch=self._epoch).write(frame)
        transfers = [self._group.send(frame, shard + 1) for shard in range(self._num_shards)]
        for transfer in transfers:
            transfer.wait(timeout_s)


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
        self._posted = group.receive(self._buffers[0], 0)
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
            self._posted = self._group.receive(self._buffers[self._turn], 0)
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
        self._sent = self._group.send(self._reply[:size], 0)
