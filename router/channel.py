"""A two-ended channel that carries large tensors one way: KV pages, and experts' weights between shards.

A decode worker pulls KV pages: it asks with a message, then receives. The answer is one frame, "gone", or as many as
the pages have parts: neither end ever holds a whole prompt's KV beside its pages.
"""

from __future__ import annotations

import queue
import time
from typing import Protocol

import torch

from octet.errors import LaneError, LaneTimeoutError
from octet.ids import Epoch
from router.frames import HEADER_BYTES, Header, Kind
from router.wire import Wire


class KvChannel(Protocol):
    def send(self, pages: torch.Tensor | None) -> None:
        """Answer a pull with a part of its pages, or with None when the lease is gone. Raises: LaneError."""

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        """The next part as flat uint8, None if the lease is gone. Raises: LaneTimeoutError, PeerLostError."""

    def close(self) -> None: ...


class WireChannel:
    """Over a wire. A part is one frame, which goes from and into the memory of its tensor.

    What comes is believed to be as long as was asked for, and nothing else is read: any other frame breaks the channel.
    """

    def __init__(self, wire: Wire, epoch: Epoch) -> None:
        """
        Args:
            wire: its default deadline is that of each part.
        """
        self._wire, self._epoch = wire, epoch

    def send(self, pages: torch.Tensor | None) -> None:
        payload = torch.empty(0, dtype=torch.uint8) if pages is None else pages.reshape(-1).view(torch.uint8).cpu()
        header = memoryview(bytearray(HEADER_BYTES))
        kind = Kind.GONE if pages is None else Kind.PAGES
        Header(kind=kind, epoch=self._epoch, payload_bytes=payload.nbytes).write(header)
        self._wire.send(header, payload.numpy().data, until_s=self._deadline_s())

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        until_s, raw = self._deadline_s(), memoryview(bytearray(HEADER_BYTES))
        self._wire.receive_into(raw, until_s)
        try:
            header = Header.read(raw, self._epoch)
        except LaneError:
            self._wire.abort()
            raise
        if header.kind is Kind.GONE and header.payload_bytes == 0:
            return None
        if header.kind is not Kind.PAGES or header.payload_bytes != payload_bytes:
            self._wire.fail(LaneError, f"KV frame: found {header}, expected {payload_bytes} bytes of pages")
        pages = torch.empty(payload_bytes, dtype=torch.uint8)
        self._wire.receive_into(pages.numpy().data, until_s)
        return pages

    def close(self) -> None:
        self._wire.abort()

    def _deadline_s(self) -> float:
        return time.monotonic() + self._wire.timeout_s


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
