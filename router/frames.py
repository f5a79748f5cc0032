"""The bytes of lanes and KV channels: one frame carries header and payload together.

A frame is 64 bytes of header (eight int64) and, for a call, `x [U, H]`, `slots [U, K]` int32, `weights [U, K]` fp32;
for a reply, `y [U, H]`; for a refusal, UTF-8 text. Buffers are flat uint8 tensors and everything decoded is a view of
them. Both ends are built from the same `FrameLayout`.

Of a frame whose payload lies in memory that both ends have (`router.shared_memory`), the header alone is sent.

Shapes: `U` rows, `H` hidden, `K` experts per token.
"""

from __future__ import annotations

import dataclasses
import enum
import struct
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octet.errors import LaneError, RequestLimitError, WrongEpochError
from octet.ids import Epoch
from router.exchange import ExpertRows
from router.plan import DensePlan

HEADER_BYTES = 64
_FIELDS = struct.Struct("<8q")
MAGIC = 0x4F43544554  # "OCTET"
GIVES_WAY, SHARED = 1, 2
"""Flags, the last field of a header."""

OPEN_ROUNDS = 2
"""Rounds of a lane that may be under way at once: two micro-batches take turns."""

_REMEMBERED_ROWS = 128
"""Views of frames of up to so many rows are made once: making them takes as long as a small frame's way."""


class Kind(enum.IntEnum):
    CALL = 1
    REPLY = 2
    REFUSAL = 3
    HEARTBEAT = 4
    CLOSE = 5
    PAGES = 6
    GONE = 7


_KINDS = {kind.value: kind for kind in Kind}


class Header(NamedTuple):
    """One is made for every frame, in a third of the time that a frozen dataclass takes."""

    kind: Kind
    epoch: Epoch
    sequence: int = 0
    layer: int = 0
    num_rows: int = 0
    payload_bytes: int = 0
    gives_way: bool = False
    """Of a call; see `router.exchange.Call`."""
    shared: bool = False
    """Whether the payload is not behind this but in shared memory."""

    def write(self, buffer: torch.Tensor | memoryview) -> None:
        memory = buffer if isinstance(buffer, memoryview) else buffer.numpy().data
        size, flags = self.payload_bytes, GIVES_WAY * self.gives_way + SHARED * self.shared
        fields = (MAGIC, self.kind, self.epoch, self.sequence, self.layer, self.num_rows, size, flags)
        _FIELDS.pack_into(memory, 0, *fields)

    @staticmethod
    def read(buffer: torch.Tensor | memoryview, expected_epoch: Epoch) -> Header:
        """Raises: LaneError if this is no frame, WrongEpochError."""
        memory = buffer if isinstance(buffer, memoryview) else buffer.numpy().data
        magic, kind, epoch, sequence, layer, num_rows, payload_bytes, flags = _FIELDS.unpack_from(memory, 0)
        known = _KINDS.get(kind)
        if magic != MAGIC or known is None or flags & ~(GIVES_WAY | SHARED):
            raise LaneError(f"not a frame: magic {magic:#x}, kind {kind}, flags {flags:#x}")
        if epoch != expected_epoch:
            raise WrongEpochError(f"a frame of epoch {epoch} arrived on a lane of epoch {expected_epoch}")
        gives_way, shared = flags & GIVES_WAY != 0, flags & SHARED != 0
        return Header(known, expected_epoch, sequence, layer, num_rows, payload_bytes, gives_way, shared)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FrameLayout:
    """What both ends of a lane agree on when it is formed."""

    hidden_size: int
    experts_per_token: int
    max_rows: int
    dtype: torch.dtype

    @property
    def _x_bytes(self) -> int:
        return self.hidden_size * self.dtype.itemsize

    @property
    def _k_bytes(self) -> int:
        return self.experts_per_token * 4

    def call_bytes(self, num_rows: int) -> int:
        return HEADER_BYTES + num_rows * (self._x_bytes + 2 * self._k_bytes)

    def reply_bytes(self, num_rows: int) -> int:
        return HEADER_BYTES + num_rows * self._x_bytes

    @property
    def frame_bytes(self) -> int:
        """Of room for the largest of either direction; in whole headers, so that each begins where eight int64 may."""
        return -(-self.call_bytes(self.max_rows) // HEADER_BYTES) * HEADER_BYTES

    def check_call(self, header: Header, may_share: bool = False) -> None:
        """
        Args:
            may_share: whether there is shared memory.

        Raises: LaneError if this announces no call, or one of another size than its rows take.
        """
        expected = 0 if header.shared else self.call_bytes(header.num_rows) - HEADER_BYTES
        fits = 0 <= header.num_rows <= self.max_rows and header.payload_bytes == expected
        if header.kind is not Kind.CALL or not fits or header.shared > may_share:
            raise LaneError(f"not a call: {_announced(header)}")

    def check_reply(self, header: Header, num_rows: int, may_share: bool = False) -> None:
        """Raises: LaneError if this announces no reply of so many rows, and no refusal that is no longer than one."""
        room = self.reply_bytes(num_rows) - HEADER_BYTES
        if header.kind is Kind.REFUSAL and 0 <= header.payload_bytes <= room and not header.shared:
            return
        fits = header.num_rows == num_rows and header.payload_bytes == (0 if header.shared else room)
        if header.kind is not Kind.REPLY or not fits or header.shared > may_share:
            raise LaneError(f"it answered {num_rows} rows with {_announced(header)}")

    def rows(self, buffer: torch.Tensor, num_rows: int) -> ExpertRows:
        """The payload of a call, as views."""
        return self.unpack_call(buffer[HEADER_BYTES:], num_rows)

    def pack_call(self, rows: ExpertRows, device: torch.device) -> torch.Tensor:
        """The payload of a call without its header, as a frame of its own. Raises: RequestLimitError."""
        num_rows = len(rows.x_UH)
        self.check(num_rows)
        payload = torch.empty(self.call_bytes(num_rows) - HEADER_BYTES, dtype=torch.uint8, device=device)
        view = self.unpack_call(payload, num_rows)
        view.x_UH.copy_(rows.x_UH)
        view.slots_UK.copy_(rows.slots_UK)
        view.weights_UK.copy_(rows.weights_UK)
        return payload

    def pack_dense(self, x_TH: torch.Tensor, plan: DensePlan) -> torch.Tensor:
        """The same for every shard of a dense plan, `[X, bytes]`, in three operators. Raises: RequestLimitError."""
        num_rows, num_shards = len(x_TH), len(plan.slots_XTK)
        self.check(num_rows)
        size = self.call_bytes(num_rows) - HEADER_BYTES
        # In whole headers, so that every part of each begins where its numbers may.
        frames = torch.empty(
            (num_shards, -(-size // HEADER_BYTES) * HEADER_BYTES), dtype=torch.uint8, device=x_TH.device
        )
        frames = frames[:, :size]
        slots_at = num_rows * self._x_bytes
        weights_at = slots_at + num_rows * self._k_bytes
        frames[:, :slots_at].view(self.dtype).copy_(x_TH.reshape(1, -1).expand(num_shards, -1))
        frames[:, slots_at:weights_at].view(torch.int32).copy_(plan.slots_XTK.flatten(1))
        frames[:, weights_at:].view(torch.float32).copy_(plan.weights_TK.reshape(1, -1).expand(num_shards, -1))
        return frames

    def unpack_call(self, payload: torch.Tensor, num_rows: int) -> ExpertRows:
        """The inverse of `pack_call`, as views."""
        slots_at = num_rows * self._x_bytes
        weights_at = slots_at + num_rows * self._k_bytes
        end = weights_at + num_rows * self._k_bytes
        return ExpertRows(
            x_UH=payload[:slots_at].view(self.dtype).view(num_rows, self.hidden_size),
            slots_UK=payload[slots_at:weights_at].view(torch.int32).view(num_rows, self.experts_per_token),
            weights_UK=payload[weights_at:end].view(torch.float32).view(num_rows, self.experts_per_token),
        )

    def reply(self, buffer: torch.Tensor, num_rows: int) -> torch.Tensor:
        """The payload of a reply `[U, H]`, as a view."""
        return buffer[HEADER_BYTES : self.reply_bytes(num_rows)].view(self.dtype).view(num_rows, self.hidden_size)

    def check(self, num_rows: int) -> None:
        """Raises: RequestLimitError if a frame has no room for so many."""
        if num_rows > self.max_rows:
            raise RequestLimitError(f"{num_rows} rows in one frame: found more than the lane's {self.max_rows}")


def new_frames(layout: FrameLayout, count: int) -> npt.NDArray[np.int32]:
    """Room for so many frames, each the largest of either direction, in 32-bit words."""
    return np.zeros((count, layout.frame_bytes // 4), np.int32)


def _announced(header: Header) -> str:
    where = " in shared memory" if header.shared else ""
    return f"a {header.kind.name} of {header.num_rows} rows, {header.payload_bytes} bytes{where}"


class FrameBuffer:
    """A frame in `new_frames`, with what is looked at of it again and again."""

    def __init__(self, layout: FrameLayout, words: npt.NDArray[np.int32]) -> None:
        self._layout = layout
        array = words.view(np.uint8)
        self.bytes = torch.from_numpy(array)
        self.memory = array.data
        """For headers."""
        self._rows: dict[int, ExpertRows] = {}
        self._replies: dict[int, torch.Tensor] = {}

    def rows(self, num_rows: int) -> ExpertRows:
        """The payload of a call, as views."""
        if num_rows > _REMEMBERED_ROWS:
            return self._layout.rows(self.bytes, num_rows)
        if num_rows not in self._rows:
            self._rows[num_rows] = self._layout.rows(self.bytes, num_rows)
        return self._rows[num_rows]

    def reply(self, num_rows: int) -> torch.Tensor:
        """The payload of a reply `[U, H]`, as a view."""
        if num_rows > _REMEMBERED_ROWS:
            return self._layout.reply(self.bytes, num_rows)
        if num_rows not in self._replies:
            self._replies[num_rows] = self._layout.reply(self.bytes, num_rows)
        return self._replies[num_rows]
