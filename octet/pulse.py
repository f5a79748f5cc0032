"""A process's pulse: an echo that neither long arithmetic nor the interpreter's lock can silence, and whoever feels it.

ZeroMQ's own proxy is the echo: it runs outside the interpreter. What comes back says that the process is scheduled,
and no more than that: whether its interpreter is of any use, its answers to calls must tell.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypeVar

import zmq

from octet.addresses import bind, connect

_MAX_BYTES = 256
"""ZeroMQ's own greetings are bounded by it, too."""
_MAX_QUEUED = 64
_Name = TypeVar("_Name", bound=str)


class Pulse:
    """The end that echoes. It has a port of its own."""

    def __init__(self, host: str) -> None:
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        for option, value in _BOUNDS:
            self._socket.setsockopt(option, value)
        self.address = bind(self._socket, host)
        self._thread = threading.Thread(target=self._echo, name="pulse", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Idempotent."""
        self._context.term()

    def _echo(self) -> None:
        try:
            zmq.proxy(self._socket, self._socket)
        except zmq.ContextTerminated:
            pass  # `close`: it is how a proxy ends.
        finally:
            self._socket.close(linger=0)


class Pulses:
    """The end that feels the pulses of others, at a beat that its owner gives. Belongs to one thread; never blocks."""

    def __init__(self) -> None:
        self._context = zmq.Context(io_threads=1)
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def keep(self, addresses: Mapping[_Name, str]) -> None:
        """Feel these, by name, and no others."""
        for name in self._sockets.keys() - addresses.keys():
            self._sockets.pop(name).close(linger=0)
        for name in addresses.keys() - self._sockets.keys():
            socket = self._context.socket(zmq.DEALER)
            for option, value in _BOUNDS:
                socket.setsockopt(option, value)
            connect(socket, addresses[name])
            self._sockets[name] = socket

    def beat(self) -> set[str]:
        """Ask all of them again. Returns: who has answered since the last time."""
        heard = set()
        for name, socket in self._sockets.items():
            while socket.poll(0, zmq.POLLIN):
                socket.recv_multipart(zmq.NOBLOCK)
                heard.add(name)
            if socket.poll(0, zmq.POLLOUT):
                socket.send(b"", zmq.NOBLOCK)
        return heard

    def close(self) -> None:
        """Idempotent."""
        self.keep({})
        self._context.term()


_BOUNDS = (
    (zmq.MAXMSGSIZE, _MAX_BYTES),
    (zmq.SNDHWM, _MAX_QUEUED),
    (zmq.RCVHWM, _MAX_QUEUED),
    (zmq.LINGER, 0),
)
