"""A two-ended channel that carries large tensors, like a lane of two: KV pages, and experts' weights between shards.

A decode worker pulls KV pages: it asks with a message, then receives. The answer is one frame, "gone", or as many as
the pages have parts: neither end ever holds a whole prompt's KV beside its pages.
"""

from __future__ import annotations

import queue
from typing import Protocol

import torch

from octet.errors import LaneError, LaneTimeoutError
from octet.ids import Epoch
from router.frames import HEADER_BYTES, Header, Kind
from router.group import Group


class KvChannel(Protocol):
    def send(self, pages: torch.Tensor | None) -> None:
        """Answer a pull with a part of its pages, or with None when the lease is gone. Raises: LaneError."""

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        """The next part as flat uint8, None if the lease is gone. Raises: LaneTimeoutError, PeerLostError."""

    def close(self) -> None: ...


class GroupChannel:
    """Over a process group of two."""

    def __init__(self, group: Group, epoch: Epoch, timeout_s: float) -> None:
        self._group, self._epoch, self._timeout_s = group, epoch, timeout_s

    def send(self, pages: torch.Tensor | None) -> None:
        payload = None if pages is None else pages.reshape(-1).view(torch.uint8)
        size = 0 if payload is None else len(payload)
        frame = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)
        Header(kind=Kind.GONE if payload is None else Kind.PAGES, epoch=self._epoch, payload_bytes=size).write(frame)
        if payload is not None:
            frame[HEADER_BYTES:] = payload
        self._group.send(frame, to=1).wait(self._timeout_s)

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        frame = torch.empty(HEADER_BYTES + payload_bytes, dtype=torch.uint8)
        self._group.receive(frame, source=0).wait(self._timeout_s)
        header = Header.read(frame, self._epoch)
        if header.kind is Kind.GONE:
            return None
        if header.kind is not Kind.PAGES or header.payload_bytes != payload_bytes:
            raise LaneError(f"KV frame: found {header}, expected {payload_bytes} bytes of pages")
        return frame[HEADER_BYTES:]

    def close(self) -> None:
        self._group.abort()


class LocalChannel:
    """Within one process; the same object serves both ends."""

    def __init__(self, timeout_s: float) -> None:
        self._queue: queue.Queue[torch.Tensor | None] = queue.Queue(maxsize=1)
        self._timeout_s = timeout_s

    def send(self, pages: torch.Tensor | None) -> None:
        try:
            self._queue.put(None if pages is None else pages.reshape(-1).view(torch.uint8), timeout=self._timeout_s)
        except queue.Full:
            raise LaneTimeoutError(f"pages were not taken within {self._timeout_s} s") from None

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        try:
            pages = self._queue.get(timeout=self._timeout_s)
        except queue.Empty:
            raise LaneTimeoutError(f"no pages within {self._timeout_s} s") from None
        if pages is not None and len(pages) != payload_bytes:
            raise LaneError(f"found {len(pages)} bytes of pages, expected {payload_bytes}")
        return pages

    def close(self) -> None:
        return
