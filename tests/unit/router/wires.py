"""A wire whose other end has said some bytes, whatever they are, and then no more."""

from __future__ import annotations

import contextlib
import mmap
import socket
from collections.abc import Iterator

from router.wire import Wire


@contextlib.contextmanager
def hearing(sent: bytes, host: str, timeout_s: float, shared: mmap.mmap | None = None) -> Iterator[Wire]:
    with socket.create_server((host, 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        wire = Wire(listener.accept()[0], timeout_s, shared)
    with other:
        other.sendall(sent)
        other.shutdown(socket.SHUT_WR)
        yield wire
