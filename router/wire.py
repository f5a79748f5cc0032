"""A wire: one TCP connection between two of our processes, which carries frames in order, each way.

Whoever waits for a frame reads it from the socket itself, and who sends one writes it there: no thread stands between.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hmac
import importlib
import secrets
import socket
import time
import weakref
from types import ModuleType

from torch.distributed import DistError

from octet.errors import LaneError, LaneTimeoutError, PeerLostError
from router.group import GroupStore

HOST_SIDE, GUEST_SIDE = 0, 1
"""Ranks of a wire: the one that hosts the store listens, the other connects."""

_NONCE_BYTES = 16
_WELCOME = b"\x01"
_ADDRESS = "address"


class Wire:
    """A connected end. Any thread may call `abort`."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        """
        Args:
            timeout_s: default deadline of whoever waits on it.
        """
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._connection, self.timeout_s = connection, timeout_s
        self.fd = connection.fileno()
        self._given_up = False
        # The descriptor stays open as long as anybody may be waiting on it.
        weakref.finalize(self, connection.close)

    @staticmethod
    def join(store: GroupStore, name: str, rank: int, host: str, connect_s: float, timeout_s: float) -> Wire:
        """Connect to the other rank, which joins at the same time.

        Args:
            host: this end's address.

        Raises: LaneTimeoutError if it does not come.
        """
        deadline_s = time.monotonic() + connect_s
        try:
            if rank == HOST_SIDE:
                connection = _accept(store, name, host, deadline_s)
            else:
                connection = _connect(store, name, deadline_s)
        except (OSError, RuntimeError, DistError) as error:
            raise LaneTimeoutError(f"wire {name}: nobody joined rank {rank} in {connect_s} s: {error}") from None
        return Wire(connection, timeout_s)

    def check(self, status: int, timeout_s: float) -> None:
        """Raises: LaneError for what a call of `router.wire_cpu` ended with; the wire is of no more use then."""
        if status >= 0:
            return
        given_up = self._given_up
        self.abort()
        if given_up:
            raise LaneError("this end has given the wire up")
        if status == wire_cpu().TIMED_OUT:
            raise LaneTimeoutError(f"nothing came for {timeout_s:g} s")
        if status == wire_cpu().NO_FRAME:
            raise LaneError("not a frame: it says that it is longer than any may be")
        raise PeerLostError("the other end has closed the connection")

    def abort(self) -> None:
        """Break the connection: whoever waits on it, here or at the other end, gets an error now. Idempotent."""
        self._given_up = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def milliseconds(seconds: float) -> int:
    """At least one: `poll` returns at once for none."""
    return max(1, round(1000 * seconds))


def _accept(store: GroupStore, name: str, host: str, deadline_s: float) -> socket.socket:
    """Raises: OSError."""
    nonce = secrets.token_hex(_NONCE_BYTES)
    with socket.create_server((host, 0), family=_family(host)) as listener:
        port = listener.getsockname()[1]
        store.prefix(name).set(_ADDRESS, f"{host} {port} {nonce}")
        while True:
            listener.settimeout(_left(deadline_s))
            connection, _ = listener.accept()
            try:
                connection.settimeout(_left(deadline_s))
                if hmac.compare_digest(_read(connection, len(nonce)), nonce.encode()):
                    connection.sendall(_WELCOME)
                    return connection
            except OSError:
                # Somebody else knocked.
                pass
            connection.close()


def _connect(store: GroupStore, name: str, deadline_s: float) -> socket.socket:
    """Raises: OSError, RuntimeError or DistError."""
    known = store.prefix(name)
    known.wait([_ADDRESS], datetime.timedelta(seconds=_left(deadline_s)))
    host, port, nonce = known.get(_ADDRESS).split(b" ")
    connection = socket.create_connection((host.decode(), int(port)), _left(deadline_s))
    try:
        connection.sendall(nonce)
        connection.settimeout(_left(deadline_s))
        if _read(connection, 1) != _WELCOME:
            raise OSError("it was turned away")
    except BaseException:
        connection.close()
        raise
    return connection


def _read(connection: socket.socket, size: int) -> bytes:
    """Raises: OSError."""
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionResetError("closed by peer")
        data += part
    return data


def _left(deadline_s: float) -> float:
    """Raises: TimeoutError."""
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError("timed out")
    return left_s


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


@functools.cache
def wire_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.wire_cpu")
