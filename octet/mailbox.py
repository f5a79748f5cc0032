"""Messages between our own processes: msgpack over ZeroMQ push/pull sockets, to which members alone can connect.

A process has one mailbox. It binds one inbound socket and connects one outbound socket to every peer that it writes
to. ZeroMQ keeps the order of messages from one sender and reconnects by itself; what a dead peer never read is lost,
which is why every exchange built on this carries a deadline of its own.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Collection, Mapping

import zmq
import zmq.asyncio

from octet.addresses import bind, connect
from octet.doorkeeper import MAX_MESSAGE_BYTES, Doorkeeper, Keys
from octet.errors import UnavailableError, WireError
from octet.ids import WorkerId
from octet.messages import Message, decode, encode
from octet.secret import ClusterSecret

_log = logging.getLogger(__name__)

_MAX_QUEUED = 100_000
_WAKE = b""
_WAKER = "inproc://wake"
"""Within the process, where nobody has to show who he is."""
_LOG_EVERY_S = 1.0


class Drops:
    """Counts what arrived and was no message, or none that its receiver takes."""

    def __init__(self) -> None:
        self.num, self._logged_s = 0, 0.0

    def note(self, error: WireError) -> None:
        self.num += 1
        now_s = time.monotonic()
        # However much of it comes, it does not fill the log.
        if now_s - self._logged_s >= _LOG_EVERY_S:
            self._logged_s = now_s
            _log.error("a message is dropped, %d so far: %s: %s", self.num, type(error).__name__, error)


def _open_inbound(
    context: zmq.Context[zmq.Socket[bytes]], host: str, keys: Keys
) -> tuple[zmq.Socket[bytes], Doorkeeper, str]:
    """The guarded socket, who guards it, and its address."""
    inbound = context.socket(zmq.PULL)
    inbound.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
    keys.guard(inbound)
    doorkeeper = Doorkeeper(context, keys, inbound)
    return inbound, doorkeeper, bind(inbound, host)


class Mailbox:
    """The blocking mailbox of an engine process. `receive` belongs to one thread; `send` may be called from any."""

    def __init__(self, host: str, secret: ClusterSecret) -> None:
        self._context, keys = zmq.Context(io_threads=1), Keys(secret)
        self._inbound, self._doorkeeper, self.address = _open_inbound(self._context, host, keys)
        self.drops = Drops()
        self._outbound = Outbound(self._context, keys)
        self._inbound.bind(_WAKER)
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.connect(_WAKER)
        self._wake_lock = threading.Lock()

    @property
    def num_refused(self) -> int:
        """Connections of strangers."""
        return self._doorkeeper.num_refused

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        self._outbound.connect(peers)

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        self._outbound.disconnect(peers)

    def send(self, to: WorkerId, message: Message) -> None:
        """Raises: UnavailableError if `to` is unknown, does not read, or takes no message of this size."""
        self._outbound.send(to, message)

    def receive(self, timeout_s: float) -> list[Message]:
        """Every message that waits; blocks up to `timeout_s` for the first one. What is no message is dropped."""
        messages: list[Message] = []
        if self._inbound.poll(math.ceil(timeout_s * 1000)):
            while True:
                try:
                    data = self._inbound.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if data != _WAKE:
                    self._take(data, messages)
        return messages

    def _take(self, data: bytes, messages: list[Message]) -> None:
        try:
            messages.append(decode(data))
        except WireError as error:
            self.drops.note(error)

    def wake(self) -> None:
        """Let a blocked `receive` return now. Any thread may call it."""
        with self._wake_lock:
            self._waker.send(_WAKE)

    def close(self) -> None:
        self._outbound.close()
        self._waker.close(linger=0)
        self._doorkeeper.close()
        self._inbound.close(linger=0)
        self._context.term()


class AsyncMailbox:
    """The asyncio mailbox of a frontend. Belongs to one event loop."""

    def __init__(self, host: str, secret: ClusterSecret) -> None:
        self._context, keys = zmq.Context(io_threads=1), Keys(secret)
        self._socket, self._doorkeeper, self.address = _open_inbound(self._context, host, keys)
        self._inbound = zmq.asyncio.Socket.from_socket(self._socket)
        self.drops = Drops()
        self._outbound = Outbound(self._context, keys)

    @property
    def num_refused(self) -> int:
        """Connections of strangers."""
        return self._doorkeeper.num_refused

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        self._outbound.connect(peers)

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        self._outbound.disconnect(peers)

    def send(self, to: WorkerId, message: Message) -> None:
        """Raises: UnavailableError if `to` is unknown, does not read, or takes no message of this size."""
        self._outbound.send(to, message)

    async def receive(self) -> Message:
        """The next message. What is no message is dropped."""
        while True:
            try:
                return decode(await self._inbound.recv())
            except WireError as error:
                self.drops.note(error)

    def close(self) -> None:
        self._outbound.close()
        self._doorkeeper.close()
        self._inbound.close(linger=0)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)


class Outbound:
    """One push socket per peer; never blocks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], keys: Keys) -> None:
        self._context, self._keys = context, keys
        self._sockets: dict[WorkerId, zmq.Socket[bytes]] = {}
        self._addresses: dict[WorkerId, str] = {}
        self._lock = threading.Lock()

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        """Add or replace peers."""
        with self._lock:
            for worker_id, address in peers.items():
                if self._addresses.get(worker_id) == address:
                    continue
                if worker_id in self._sockets:
                    self._sockets[worker_id].close(linger=0)
                socket = self._context.socket(zmq.PUSH)
                socket.setsockopt(zmq.SNDHWM, _MAX_QUEUED)
                socket.setsockopt(zmq.LINGER, 0)
                self._keys.show(socket)
                connect(socket, address)
                self._sockets[worker_id], self._addresses[worker_id] = socket, address

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        """Forget peers that are gone, and what they have not read. Idempotent."""
        with self._lock:
            for worker_id in peers:
                self._addresses.pop(worker_id, None)
                socket = self._sockets.pop(worker_id, None)
                if socket is not None:
                    socket.close(linger=0)

    def send(self, to: WorkerId, message: Message) -> None:
        data = encode(message)
        if len(data) > MAX_MESSAGE_BYTES:
            raise UnavailableError(f"{to} takes no {type(message).__name__} of {len(data)} bytes")
        with self._lock:
            try:
                self._sockets[to].send(data, zmq.NOBLOCK)
            except KeyError:
                raise UnavailableError(f"no such peer: {to}") from None
            except zmq.Again:
                raise UnavailableError(f"{to} has {_MAX_QUEUED} unread messages") from None

    def close(self) -> None:
        with self._lock:
            for socket in self._sockets.values():
                socket.close(linger=0)
            self._sockets.clear()
