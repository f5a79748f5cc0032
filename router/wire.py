"""A wire: one TCP connection between two of our processes, which carries frames in order, each way.

Whoever waits for a frame reads it from the socket itself, and who sends one writes it there: no thread stands between.
Small frames, of which each layer has some, go through compiled calls (`router.wire_cpu`); large ones, and headers on
GPUs, through the two methods here, which do without numba.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import mmap
import select
import socket
import time
import weakref
from types import ModuleType
from typing import NoReturn

from octet.errors import LaneError, LaneTimeoutError, PeerLostError
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, meet
from router.shared_memory import share


class Wire:
    """A connected end. Any thread may call `abort`; otherwise one thread sends and one receives."""

    def __init__(self, connection: socket.socket, timeout_s: float, shared: mmap.mmap | None = None) -> None:
        """
        Args:
            timeout_s: default deadline of whoever waits on it.
            shared: memory that the other end has too.
        """
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._connection, self.timeout_s, self.shared = connection, timeout_s, shared
        self.fd = connection.fileno()
        self.within_host = _within_host(connection)
        """Whether both ends are on one machine."""
        self._given_up = False
        # The descriptor stays open as long as anybody may be waiting on it.
        weakref.finalize(self, connection.close)

    @staticmethod
    def join(
        store: GroupStore,
        name: str,
        rank: int,
        host: str,
        connect_s: float,
        timeout_s: float,
        shared_bytes: int = 0,
    ) -> Wire:
        """Connect to the other rank, which joins at the same time. See `router.handshake.meet`.

        Args:
            shared_bytes: of memory for both ends, where they are on one machine and can have any; the same at both.
        """
        connection = meet(store, name, rank, host, connect_s)
        # Hosts that are network namespaces of one machine are told apart as others are.
        size = shared_bytes if rank == GUEST_SIDE or _within_host(connection) else 0
        try:
            shared = share(connection, rank, size, connect_s) if shared_bytes else None
        except OSError as error:
            connection.close()
            raise LaneTimeoutError(f"wire {name}: rank {rank} was left alone: {error}") from None
        return Wire(connection, timeout_s, shared)

    def send(self, *parts: memoryview, until_s: float) -> None:
        """Send all bytes of these, one after the other, by `until_s` of the monotonic clock.

        Returns once the system has taken them: the other end may not have read them yet.
        Raises: LaneTimeoutError, PeerLostError, LaneError; the wire is of no more use then.
        """
        left = [part for part in parts if part.nbytes]
        while left:
            # The other end may have gone while it was not reading; nobody makes room then.
            events = self._await(select.POLLOUT | select.POLLRDHUP, until_s, "a frame was not read in time")
            if events & select.POLLRDHUP:
                self._fail_lost()
            try:
                sent = self._connection.sendmsg(left)
            except BlockingIOError:
                continue
            except OSError:
                self._fail_lost()
            while left and sent >= left[0].nbytes:
                sent -= left.pop(0).nbytes
            if sent:
                left[0] = left[0][sent:]

    def receive_into(self, room: memoryview, until_s: float) -> None:
        """Fill all of it with what comes next, by `until_s` of the monotonic clock.

        Raises: LaneTimeoutError, PeerLostError, LaneError; the wire is of no more use then.
        """
        have = 0
        while have < room.nbytes:
            self._await(select.POLLIN, until_s, "no whole frame came in time")
            try:
                count = self._connection.recv_into(room[have:])
            except BlockingIOError:
                continue
            except OSError:
                count = 0
            if count == 0:
                self._fail_lost()
            have += count

    def check(self, status: int, timeout_s: float) -> None:
        """Raises: LaneError for what a call of `router.wire_cpu` ended with; the wire is of no more use then."""
        if status >= 0:
            return
        if status == wire_cpu().TIMED_OUT:
            self.fail(LaneTimeoutError, f"nothing came for {timeout_s:g} s")
        if status == wire_cpu().NO_FRAME:
            self.fail(LaneError, "not a frame: it says that it is longer than any may be")
        self._fail_lost()

    def fail(self, kind: type[LaneError], text: str) -> NoReturn:
        """Break the connection and raise this, or that this end had broken it already."""
        # No variable holds the error: it would hold this wire, and its port, until the next garbage collection.
        given_up = self._given_up
        self.abort()
        raise LaneError("this end has given the wire up") if given_up else kind(text)

    def abort(self) -> None:
        """Break the connection: whoever waits on it, here or at the other end, gets an error now. Idempotent."""
        self._given_up = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _await(self, events: int, until_s: float, what: str) -> int:
        """Which of the events there are, and of those that are always told. Raises: LaneTimeoutError, LaneError."""
        poll = select.poll()
        poll.register(self.fd, events)
        left_s = until_s - time.monotonic()
        # What came before this end gave up is not read any more.
        if self._given_up or left_s <= 0 or not (there := poll.poll(1000 * left_s)):
            self.fail(LaneTimeoutError, what)
        return there[0][1]

    def _fail_lost(self) -> NoReturn:
        self.fail(PeerLostError, "the other end has closed the connection")


def _within_host(connection: socket.socket) -> bool:
    try:
        # Of the internet's families the first field is the address; elsewhere there is no other machine.
        return bool(connection.getsockname()[:1] == connection.getpeername()[:1])
    except OSError:
        # It is lost, which is told where it is used.
        return False


def milliseconds(seconds: float) -> int:
    """At least one: `poll` returns at once for none."""
    return max(1, round(1000 * seconds))


@functools.cache
def wire_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.wire_cpu")
