"""Addresses as they are written: `host:port`, and `[host]:port` where the host is an IPv6 address."""

from __future__ import annotations

import socket

import zmq


def family(host: str) -> socket.AddressFamily:
    """Of a host by its number; of a name, that of IPv4."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def with_port(host: str, port: int) -> str:
    """
    Args:
        host: with brackets or without.
    """
    return f"[{host}]:{port}" if family(host) == socket.AF_INET6 and not host.startswith("[") else f"{host}:{port}"


def host_and_port(address: str) -> tuple[str, int]:
    """Returns: the host without brackets. Raises: ValueError."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ValueError(f"{address!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def bind(inbound: zmq.Socket[bytes], host: str) -> str:
    """To a free port of a host. Returns: the address to connect to."""
    inbound.setsockopt(zmq.IPV6, family(host) == socket.AF_INET6)
    port = inbound.bind_to_random_port(f"tcp://[{host}]" if family(host) == socket.AF_INET6 else f"tcp://{host}")
    return f"tcp://{with_port(host, port)}"


def connect(outbound: zmq.Socket[bytes], address: str) -> None:
    """To what `bind` has returned."""
    outbound.setsockopt(zmq.IPV6, address.startswith("tcp://["))
    outbound.connect(address)
