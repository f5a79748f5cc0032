"""A lane over NCCL: frames between GPUs, each announced by a header over a wire between attention worker and shard.

An NCCL receive occupies multiprocessors until its sender comes, and a shard has as many lanes as there are attention
workers. So nobody posts one before it knows that the frame is there, and how long it is: the header says so. Silence
and lost peers are likewise noticed on the wires, where a wait costs nothing.

Ranks are those of the NCCL group: the attention worker is 0, shard `i` is `i + 1`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from octet.errors import ExpertMissingError, LaneError
from octet.ids import Epoch
from router.exchange import Call, Ticket, add_rows, rows_of
from router.frames import HEADER_BYTES, OPEN_ROUNDS, FrameLayout, Header, Kind
from router.group_store import GroupStore
from router.nccl_id import store_with_id
from router.plan import DensePlan, DispatchPlan
from router.wire import Wire


class NcclGroup:
    """Frames between the attention worker, rank 0, and its shards, on the current CUDA stream.

    Calls and replies have a communicator each: what one carries is done in order, and a shard's reply must not wait for
    the worker's next call to be taken, nor that for the reply.
    """

    def __init__(self, store: GroupStore, name: str, rank: int, size: int, device: torch.device) -> None:
        """Every rank connects at the same time. Raises: LaneTimeoutError if no member says how."""
        from torch._C._distributed_c10d import ProcessGroupNCCL

        nccl: Any = ProcessGroupNCCL
        self._size, self._nothing = size, torch.empty(0, dtype=torch.uint8, device=device)
        self._sent: collections.deque[tuple[Any, dict[int, torch.Tensor]]] = collections.deque()
        groups = []
        # torch gives every so many ranks (128, if nobody says otherwise) a root that draws an id of its own. Our store
        # carries one id.
        os.environ["TORCH_NCCL_RANKS_PER_ROOT"] = str(2**31 - 1)
        for way in ("calls", "replies"):
            # NCCL connects at its first exchange; that must not fall into a request.
            here = [torch.zeros(1, dtype=torch.uint8, device=device) for _ in range(size)]
            with store_with_id(store, f"{name}/nccl/{way}", rank) as own:
                groups.append(nccl(own, rank, size, nccl.Options()))
                groups[-1].alltoall([torch.empty_like(part) for part in here], here).wait()
        calls, replies = groups
        self._out, self._in = (calls, replies) if rank == 0 else (replies, calls)
        self._alive: tuple[Any, ...] = (calls, replies)

    def send(self, frames: Mapping[int, torch.Tensor]) -> None:
        """Send flat uint8 frames by rank. Neither host nor stream waits; a frame must not change afterwards.

        Raises: LaneError where the communicator was aborted, or NCCL says no.
        """
        try:
            while self._sent and self._sent[0][0].is_completed():
                self._sent.popleft()
            work = self._out.alltoall([self._nothing] * self._size, self._by_rank(frames))
        except RuntimeError as error:
            raise LaneError(f"NCCL cannot send: {error}") from None
        # Its memory is nobody else's until it has gone.
        self._sent.append((work, dict(frames)))

    def receive(self, rooms: Mapping[int, torch.Tensor]) -> None:
        """Receive flat uint8 frames by rank. The stream waits, the host does not. Raises: LaneError, as `send`."""
        try:
            self._in.alltoall(self._by_rank(rooms), [self._nothing] * self._size).wait()
        except RuntimeError as error:
            raise LaneError(f"NCCL cannot receive: {error}") from None

    def abort(self) -> None:
        """Idempotent."""
        groups, self._alive = self._alive, ()
        for group in groups:
            group.abort()

    def _by_rank(self, frames: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        return [frames.get(rank, self._nothing) for rank in range(self._size)]


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """One dispatch under way."""

    layer: int
    sequence: int
    rows: dict[int, torch.Tensor | None]
    """The tokens `[U]` sent, by shard; None for all of them."""
    num_rows: dict[int, int]


class NcclLaneExchange:
    """The attention worker's end. Belongs to one thread and its CUDA stream.

    The sums of a dense plan are received at once: it is known how many bytes they are. Whether shards have sent them
    their headers say, which `settle` reads; until then nothing must wait for the device, which waits for the shards.
    """

    def __init__(
        self, wires: Sequence[Wire], data: NcclGroup, layout: FrameLayout, epoch: Epoch, device: torch.device
    ) -> None:
        """
        Args:
            wires: one per shard, in the order of the placement's.
        """
        self._wires, self._data = tuple(wires), data
        self.gives_way = self.crowded = False
        self._layout, self._epoch, self._device = layout, epoch, device
        self._open: collections.deque[_Round] = collections.deque()
        self._unsettled: collections.deque[_Round] = collections.deque()
        self._sequence = 0

    @property
    def num_shards(self) -> int:
        return len(self._wires)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        if isinstance(plan, DensePlan):
            frames = dict(enumerate(self._layout.pack_dense(x_TH, plan).unbind()))
            started = _Round(layer, self._sequence, dict.fromkeys(frames), dict.fromkeys(frames, len(x_TH)))
        else:
            parts = {shard: part for shard in range(self.num_shards) if (part := plan.of(shard)) is not None}
            frames = {shard: self._layout.pack_call(rows_of(x_TH, part), self._device) for shard, part in parts.items()}
            rows = {shard: part.rows_U for shard, part in parts.items()}
            started = _Round(layer, self._sequence, rows, {s: len(part.slots_UK) for s, part in parts.items()})
        for shard, frame in frames.items():
            self._announce(shard, Kind.CALL, layer, started.num_rows[shard], len(frame))
        if frames:
            self._data.send({shard + 1: frame for shard, frame in frames.items()})
        self._open.append(started)
        self._sequence += 1
        return started

    def await_first(self, ticket: Ticket) -> None:
        return

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        dense = bool(current.rows) and all(rows_U is None for rows_U in current.rows.values())
        # Headers come in the order of the rounds; what an earlier one was refused must not leave this one's numbers
        # behind, which the next receive would take for its own.
        refused = [] if dense else [*self._refusals(), *self._announced(current)]
        rooms = {shard: self._room(num_rows) for shard, num_rows in current.num_rows.items()}
        if rooms:
            self._data.receive({shard + 1: room for shard, room in rooms.items()})
        if refused:
            raise ExpertMissingError("; ".join(refused))
        for shard, rows_U in current.rows.items():
            add_rows(y_TH, rows_U, rooms[shard].view(self._layout.dtype).view(-1, self._layout.hidden_size))
        if dense:
            self._unsettled.append(current)

    def settle(self) -> None:
        if refused := self._refusals():
            raise ExpertMissingError("; ".join(refused))

    def heartbeat(self) -> None:
        for shard in range(self.num_shards):
            self._announce(shard, Kind.HEARTBEAT)

    def close(self) -> None:
        """Tell every shard, and break the connections."""
        for shard, wire in enumerate(self._wires):
            # A shard that is gone already needs no telling.
            with contextlib.suppress(LaneError):
                self._announce(shard, Kind.CLOSE)
            wire.abort()
        self._data.abort()

    def _refusals(self) -> list[str]:
        """What shards refused of the rounds that are received and not settled. Raises: LaneError."""
        refused: list[str] = []
        while self._unsettled:
            refused += self._announced(self._unsettled.popleft())
        return refused

    def _announced(self, current: _Round) -> list[str]:
        """Wait for the headers of a round's replies; what shards say that refuse. Raises: LaneError."""
        refused = []
        try:
            for shard, num_rows in current.num_rows.items():
                wire = self._wires[shard]
                header = _heard(wire, self._epoch, wire.timeout_s)
                if header.sequence != current.sequence:
                    raise LaneError(f"shard {shard} answered frame {header.sequence}, expected {current.sequence}")
                self._layout.check_reply(header, num_rows)
                if header.kind is Kind.REFUSAL:
                    text = bytearray(header.payload_bytes)
                    wire.receive_into(memoryview(text), time.monotonic() + wire.timeout_s)
                    refused.append(f"shard {shard}: {text.decode(errors='replace')}")
        except LaneError:
            # The device may be waiting for what will never come, and others of this process for the device.
            self._data.abort()
            raise
        return refused

    def _room(self, num_rows: int) -> torch.Tensor:
        size = self._layout.reply_bytes(num_rows) - HEADER_BYTES
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _announce(self, shard: int, kind: Kind, layer: int = 0, num_rows: int = 0, payload_bytes: int = 0) -> None:
        header = Header(
            kind=kind,
            epoch=self._epoch,
            sequence=self._sequence,
            layer=layer,
            num_rows=num_rows,
            payload_bytes=payload_bytes,
        )
        _tell(self._wires[shard], header)


class NcclLanePort:
    """A shard's end. One thread receives, another may reply; both use the device's current stream."""

    def __init__(
        self,
        wire: Wire,
        data: NcclGroup,
        layout: FrameLayout,
        epoch: Epoch,
        timeout_s: float,
        device: torch.device,
    ) -> None:
        """
        Args:
            timeout_s: silence after which the attention worker is given up; it sends heartbeats more often than that.
        """
        self._wire, self._data, self._layout = wire, data, layout
        self._epoch, self._timeout_s, self._device = epoch, timeout_s, device

    def receive(self) -> Call | None:
        while True:
            header = _heard(self._wire, self._epoch, self._timeout_s)
            if header.kind is Kind.CLOSE:
                return None
            if header.kind is not Kind.HEARTBEAT:
                self._layout.check_call(header)
                frame = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._device)
                self._data.receive({0: frame})
                rows = self._layout.unpack_call(frame, header.num_rows)
                return Call(layer=header.layer, rows=rows, sequence=header.sequence)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        frame = y_UH.to(self._layout.dtype).contiguous().view(-1).view(torch.uint8)
        self._post(call, Kind.REPLY, frame)

    def refuse(self, call: Call, error: Exception) -> None:
        """The text goes over the wire. Numbers are sent too, as the other end may be waiting for them: no numbers."""
        x_UH = call.rows.x_UH
        text = str(error).encode()[: self._layout.reply_bytes(len(x_UH)) - HEADER_BYTES]
        frame = torch.full_like(x_UH, torch.nan).view(-1).view(torch.uint8)
        self._post(call, Kind.REFUSAL, frame, text)

    def close(self) -> None:
        self._wire.abort()
        self._data.abort()

    def _post(self, call: Call, kind: Kind, frame: torch.Tensor, text: bytes = b"") -> None:
        header = Header(
            kind=kind,
            epoch=self._epoch,
            sequence=call.sequence,
            layer=call.layer,
            num_rows=0 if kind is Kind.REFUSAL else len(call.rows.x_UH),
            payload_bytes=len(text) if kind is Kind.REFUSAL else len(frame),
        )
        _tell(self._wire, header, text)
        self._data.send({0: frame})


def _tell(wire: Wire, header: Header, text: bytes = b"") -> None:
    """Raises: LaneError."""
    memory = memoryview(bytearray(HEADER_BYTES) + text)
    header.write(memory)
    wire.send(memory, until_s=time.monotonic() + wire.timeout_s)


def _heard(wire: Wire, epoch: Epoch, timeout_s: float) -> Header:
    """The next header. Raises: LaneError."""
    memory = memoryview(bytearray(HEADER_BYTES))
    wire.receive_into(memory, time.monotonic() + timeout_s)
    return Header.read(memory, epoch)
