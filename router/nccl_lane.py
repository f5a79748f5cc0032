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
import time
from collections.abc import Sequence
from typing import Any

import torch

from octet.errors import ExpertMissingError, LaneError
from octet.ids import Epoch
from router.exchange import Call, Ticket, rows_of
from router.frames import HEADER_BYTES, FrameLayout, Header, Kind
from router.group_store import GroupStore
from router.lane import OPEN_ROUNDS
from router.nccl_id import store_with_id
from router.plan import DispatchPlan
from router.wire import Wire


class NcclGroup:
    """All-to-all of frames among the ranks of a lane, on the current CUDA stream."""

    def __init__(self, store: GroupStore, name: str, rank: int, size: int, device: torch.device) -> None:
        """Every rank connects at the same time. Raises: LaneTimeoutError if no member says how."""
        from torch._C._distributed_c10d import ProcessGroupNCCL

        nccl: Any = ProcessGroupNCCL
        self._size, self._nothing = size, torch.empty(0, dtype=torch.uint8, device=device)
        # NCCL connects at its first exchange; that must not fall into a request.
        here = [torch.zeros(1, dtype=torch.uint8, device=device) for _ in range(size)]
        with store_with_id(store, f"{name}/nccl", rank) as own:
            self._group = nccl(own, rank, size, nccl.Options())
            self._group.alltoall([torch.empty_like(part) for part in here], here).wait()

    def exchange(self, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor]) -> None:
        """Send and receive flat uint8 frames by rank; ranks without one are left out. The stream waits, the host
        does not."""
        outputs = [receives.get(rank, self._nothing) for rank in range(self._size)]
        inputs = [sends.get(rank, self._nothing) for rank in range(self._size)]
        self._group.alltoall(outputs, inputs).wait()

    def abort(self) -> None:
        self._group.abort()


@dataclasses.dataclass(frozen=True, slots=True)
class _Round:
    """One dispatch under way."""

    layer: int
    sequence: int
    rows: dict[int, torch.Tensor]
    """The tokens `[U]` sent, by shard."""


class NcclLaneExchange:
    """The attention worker's end. Belongs to one thread and its CUDA stream."""

    def __init__(
        self, wires: Sequence[Wire], data: NcclGroup, layout: FrameLayout, epoch: Epoch, device: torch.device
    ) -> None:
        """
        Args:
            wires: one per shard, in the order of the placement's.
        """
        self._wires, self._data = tuple(wires), data
        self._layout, self._epoch, self._device = layout, epoch, device
        self._open: collections.deque[_Round] = collections.deque()
        self._sequence = 0

    @property
    def num_shards(self) -> int:
        return len(self._wires)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan) -> Ticket:
        if len(self._open) == OPEN_ROUNDS:
            raise LaneError(f"{OPEN_ROUNDS} rounds are under way: receive one first")
        parts = {shard: part for shard in range(self.num_shards) if (part := plan.of(shard)) is not None}
        frames = {shard: self._layout.pack_call(rows_of(x_TH, part), self._device) for shard, part in parts.items()}
        rows = {shard: part.rows_U for shard, part in parts.items()}
        for shard, frame in frames.items():
            self._announce(shard, Kind.CALL, layer, len(rows[shard]), len(frame))
        if frames:
            self._data.exchange({shard + 1: frame for shard, frame in frames.items()}, {})
        started = _Round(layer, self._sequence, rows)
        self._open.append(started)
        self._sequence += 1
        return started

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert self._open, "no round is under way"
        assert ticket is self._open[0], "rounds are received in the order in which they were sent"
        current = self._open.popleft()
        frames: dict[int, torch.Tensor] = {}
        refused: list[int] = []
        for shard, rows_U in current.rows.items():
            wire = self._wires[shard]
            header = _heard(wire, self._epoch, wire.timeout_s)
            if header.sequence != current.sequence:
                raise LaneError(f"shard {shard} answered frame {header.sequence}, expected {current.sequence}")
            self._layout.check_reply(header, len(rows_U))
            if header.kind is Kind.REFUSAL:
                refused.append(shard)
            frame = torch.empty(header.payload_bytes, dtype=torch.uint8, device=self._device)
            frames[shard + 1] = frame
        if frames:
            self._data.exchange({}, frames)
        if refused:
            texts = (bytes(frames[shard + 1].tolist()).decode(errors="replace") for shard in refused)
            raise ExpertMissingError("; ".join(f"shard {s}: {text}" for s, text in zip(refused, texts, strict=True)))
        hidden, dtype = self._layout.hidden_size, self._layout.dtype
        for shard, rows_U in current.rows.items():
            y_TH.index_add_(0, rows_U, frames[shard + 1].view(dtype).view(-1, hidden).float())

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
                self._data.exchange({}, {0: frame})
                rows = self._layout.unpack_call(frame, header.num_rows)
                return Call(layer=header.layer, rows=rows, sequence=header.sequence)

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        frame = y_UH.to(self._layout.dtype).contiguous().view(-1).view(torch.uint8)
        self._post(call, Kind.REPLY, len(y_UH), frame)

    def refuse(self, call: Call, error: Exception) -> None:
        room = self._layout.reply_bytes(len(call.rows.x_UH)) - HEADER_BYTES
        text = list(str(error).encode()[:room])
        self._post(call, Kind.REFUSAL, 0, torch.tensor(text, dtype=torch.uint8, device=self._device))

    def close(self) -> None:
        self._wire.abort()
        self._data.abort()

    def _post(self, call: Call, kind: Kind, num_rows: int, frame: torch.Tensor) -> None:
        header = Header(
            kind=kind,
            epoch=self._epoch,
            sequence=call.sequence,
            layer=call.layer,
            num_rows=num_rows,
            payload_bytes=len(frame),
        )
        _tell(self._wire, header)
        self._data.exchange({0: frame}, {})


def _tell(wire: Wire, header: Header) -> None:
    """Raises: LaneError."""
    memory = memoryview(bytearray(HEADER_BYTES))
    header.write(memory)
    wire.send(memory, until_s=time.monotonic() + wire.timeout_s)


def _heard(wire: Wire, epoch: Epoch, timeout_s: float) -> Header:
    """The next header. Raises: LaneError."""
    memory = memoryview(bytearray(HEADER_BYTES))
    wire.receive_into(memory, time.monotonic() + timeout_s)
    return Header.read(memory, epoch)
