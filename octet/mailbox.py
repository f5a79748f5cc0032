"""Messages between our own processes: msgpack over ZeroMQ push/pull sockets.

A process has one mailbox. It binds one inbound socket and connects one outbound socket to every peer that it writes
to. ZeroMQ keeps the order of messages from one sender and reconnects by itself; what a dead peer never read is lost,
which is why every exchange built on this carries a deadline of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Mapping

import zmq
import zmq.asyncio

from octet.errors import UnavailableError, WireError
from octet.ids import WorkerId
from octet.messages import Message, decode, encode

_log = logging.getLogger(__name__)

_MAX_QUEUED = 100_000
_WAKE = b""


class Mailbox:
    """The blocking mailbox of an engine process. `receive` belongs to one thread; `send` may be called from any."""

    def __init__(self, host: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._inbound = self._context.socket(zmq.PULL)
        self._inbound.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        port = self._inbound.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._outbound = Outbound(self._context)
        self._waker = self._context.socket(zmq.PUSH)
        self._waker.connect(self.address)
        self._wake_lock = threading.Lock()

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        self._outbound.connect(peers)

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        self._outbound.disconnect(peers)

    def send(self, to: WorkerId, message: Message) -> None:
        """Raises: UnavailableError if `to` is unknown or does not read."""
        self._outbound.send(to, message)

    def receive(self, timeout_s: float) -> list[Message]:
        """Every message that waits; blocks up to `timeout_s` for the first one. What is no message is dropped."""
        messages: list[Message] = []
        if self._inbound.poll(round(timeout_s * 1000)):
            while True:
                try:
                    data = self._inbound.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if data != _WAKE:
                    self._take(data, messages)
        return messages

    @staticmethod
    def _take(data: bytes, messages: list[Message]) -> None:
        try:
            messages.append(decode(data))
        except WireError as error:
            _log.error("a message is dropped: %s", error)

    def wake(self) -> None:
        """Let a blocked `receive` return now. Any thread may call it."""
        with self._wake_lock:
            self._waker.send(_WAKE)

    def close(self) -> None:
        self._outbound.close()
        self._waker.close(linger=0)
        self._inbound.close(linger=0)
        self._context.term()


class AsyncMailbox:
    """The asyncio mailbox of a frontend. Belongs to one event loop."""

    def __init__(self, host: str) -> None:
        self._context = zmq.asyncio.Context(io_threads=1)
        self._inbound = self._context.socket(zmq.PULL)
        self._inbound.setsockopt(zmq.RCVHWM, _MAX_QUEUED)
        port = self._inbound.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"
        self._outbound = Outbound(zmq.Context(self._context))

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        self._outbound.connect(peers)

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        self._outbound.disconnect(peers)

    def send(self, to: WorkerId, message: Message) -> None:
        """Raises: UnavailableError if `to` is unknown or does not read."""
        self._outbound.send(to, message)

    async def receive(self) -> Message:
        return decode(await self._inbound.recv())

    def close(self) -> None:
        self._outbound.close()
        self._inbound.close(linger=0)
        self._context.destroy(linger=0)


class Outbound:
    """One push socket per peer; never blocks."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._context = context
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
                socket.connect(address)
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
