"""How two of our processes connect: both show each other that they know the cluster's secret, before anything else.

One listens, for as long as it takes the other to come, and tells where in the store that it hosts.
"""

from __future__ import annotations

import secrets
import selectors
import socket
import time
from typing import cast

from torch.distributed import DistError

from octet.addresses import family
from octet.errors import LaneTimeoutError
from octet.secret import ClusterSecret
from router.group_store import GroupStore

HOST_SIDE, GUEST_SIDE = 0, 1
"""Ranks of a connection: the one that hosts the store listens, the other connects."""

_NONCE_BYTES, _PROOF_BYTES = 32, 32
_GUEST_PROOF, _HOST_PROOF = "wire guest", "wire host"
"""Each end signs both nonces for its own side alone, so that neither end's proof can be handed back to it."""
_KNOCK_S = 2.0
"""How long whoever connects may take to show who it is."""
_MAX_KNOCKING = 128
"""Who connects when so many have not shown who they are takes the place of the one that has waited longest."""


def meet(store: GroupStore, name: str, rank: int, host: str, connect_s: float) -> socket.socket:
    """Connect to the other rank, which comes at the same time.

    Args:
        name: the same at both ends, and of no other connection that is formed through this store.
        host: this end's address.

    Raises: LaneTimeoutError if it does not come.
    """
    deadline_s = time.monotonic() + connect_s
    try:
        if rank == HOST_SIDE:
            return _accept(store, name, host, deadline_s)
        return _connect(store, name, deadline_s)
    except (OSError, RuntimeError, DistError) as error:
        raise LaneTimeoutError(f"wire {name}: nobody joined rank {rank} in {connect_s} s: {error}") from None


def _accept(store: GroupStore, name: str, host: str, deadline_s: float) -> socket.socket:
    """Whoever shows first that it is a member. Strangers wait beside it, not before it. Raises: OSError."""
    with (
        socket.create_server((host, 0), family=family(host), backlog=_MAX_KNOCKING) as listener,
        selectors.DefaultSelector() as selector,
    ):
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
        store.publish(name, f"{host} {listener.getsockname()[1]}".encode())
        knocking: dict[socket.socket, _Knock] = {}

        def turn_away(connection: socket.socket) -> None:
            selector.unregister(connection)
            del knocking[connection]
            connection.close()
            store.note_refusal(f"wire {name}")

        try:
            while True:
                patience_s = [knock.until_s - time.monotonic() for knock in knocking.values()]
                for key, _ in selector.select(max(0.0, min([_left(deadline_s), *patience_s]))):
                    if key.fileobj is listener:
                        knock = _Knock.answer(listener)
                        if knock is not None:
                            knocking[knock.connection] = knock
                            selector.register(knock.connection, selectors.EVENT_READ)
                        continue
                    knock = knocking[cast("socket.socket", key.fileobj)]
                    told = knock.hear()
                    if told and knock.welcome(store.secret, name, deadline_s):
                        del knocking[knock.connection]
                        return knock.connection
                    if told is not None:
                        turn_away(knock.connection)
                now_s = time.monotonic()
                for connection, knock in list(knocking.items()):
                    if now_s >= knock.until_s or len(knocking) > _MAX_KNOCKING:
                        turn_away(connection)
        finally:
            for connection in knocking:
                connection.close()


class _Knock:
    """Somebody who has connected to the host and has to show who it is."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.until_s = connection, time.monotonic() + _KNOCK_S
        self._nonce, self._heard = secrets.token_bytes(_NONCE_BYTES), b""

    @classmethod
    def answer(cls, listener: socket.socket) -> _Knock | None:
        """None if whoever it was is gone. Raises: OSError."""
        try:
            connection, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        try:
            connection.setblocking(False)
            knock = cls(connection)
            connection.sendall(knock._nonce)
        except OSError:
            connection.close()
            return None
        return knock

    def hear(self) -> bool | None:
        """Whether it has said all that it has to; None if more has to come."""
        try:
            part = self.connection.recv(_NONCE_BYTES + _PROOF_BYTES - len(self._heard))
        except BlockingIOError:
            return None
        except OSError:
            return False
        self._heard += part
        if len(self._heard) == _NONCE_BYTES + _PROOF_BYTES:
            return True
        return None if part else False

    def welcome(self, secret: ClusterSecret, name: str, deadline_s: float) -> bool:
        """Whether it is a member; shows it then that this end is one too."""
        theirs, proof = self._heard[:_NONCE_BYTES], self._heard[_NONCE_BYTES:]
        if not secret.has_signed(_GUEST_PROOF, name.encode() + self._nonce + theirs, proof):
            return False
        try:
            self.connection.settimeout(min(_KNOCK_S, _left(deadline_s)))
            self.connection.sendall(secret.sign(_HOST_PROOF, name.encode() + self._nonce + theirs))
        except OSError:
            return False
        return True


def _connect(store: GroupStore, name: str, deadline_s: float) -> socket.socket:
    """Raises: OSError, RuntimeError or DistError."""
    host, port = store.look_up(name, _left(deadline_s)).split(b" ")
    connection = socket.create_connection((host.decode(), int(port)), _left(deadline_s))
    try:
        theirs, mine = read_exactly(connection, _NONCE_BYTES, deadline_s), secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(mine + store.secret.sign(_GUEST_PROOF, name.encode() + theirs + mine))
        proof = read_exactly(connection, _PROOF_BYTES, deadline_s)
        if not store.secret.has_signed(_HOST_PROOF, name.encode() + theirs + mine, proof):
            raise OSError("a stranger answered")
    except BaseException:
        connection.close()
        raise
    return connection


def read_exactly(connection: socket.socket, size: int, deadline_s: float) -> bytes:
    """Raises: OSError, however slowly it comes."""
    data = b""
    while len(data) < size:
        connection.settimeout(_left(deadline_s))
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
