"""A TCP port that sockets of one process share, and no other process."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def exclusive_port(host: str, port: int) -> Iterator[tuple[list[str], int]]:
    """A port on which nothing listens. Sockets with SO_REUSEPORT may be bound to it, and have to listen before the end
    of the context. Of those who ask for the same port, before or after, nobody else gets it.

    SO_REUSEPORT by itself would let them: all who set it share a port and its connections. So the port is first held
    by sockets without it. Closed connections that the port had before are no obstacle.

    Args:
        port: 0 picks a free one.

    Returns: the numeric addresses of the host, IPv6 in brackets, and the port.

    Raises: OSError if it is taken, or the host is not one of this machine.
    """
    failure: OSError | None = None
    hosts: list[str] = []
    with contextlib.ExitStack() as holders:
        for family, _, _, _, (ip, _, *rest) in socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM):
            holder = holders.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                port = _hold(holder, (ip, port, *rest))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                failure = error  # a name may stand for more addresses than this machine has
            else:
                hosts.append(f"[{ip}]" if family == socket.AF_INET6 else str(ip))
        if not hosts and failure is not None:
            raise failure
        yield hosts, port


def _hold(holder: socket.socket, address: tuple[Any, ...]) -> int:
    """Returns: the port."""
    if address[1] == 0:
        holder.bind(address)
    else:
        # With SO_REUSEADDR connections that wait for late packets are no obstacle. Two may then bind, but one listen.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
        holder.listen(0)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        # It takes no connection, but stays bound.
        holder.shutdown(socket.SHUT_RDWR)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    port: int = holder.getsockname()[1]
    return port
