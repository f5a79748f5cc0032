"""Memory that both ends of a connection have, where they are processes of one machine.

Rows that go through a socket are copied into the system and out of it again. In memory that both ends have mapped they
are written once and read where they are; the connection still says when, and breaks when the other end dies. The memory
has no name: it is gone with the last process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct
import time

from router.handshake import HOST_SIDE, read_exactly

_OFFER = struct.Struct("<3q32s")
"""Bytes of memory (0 for none), process, descriptor, and what lies at the beginning of that memory."""
_YES, _NO = b"\1", b"\0"


def share(connection: socket.socket, rank: int, size: int, connect_s: float) -> mmap.mmap | None:
    """So many bytes that the other end has too; both call this, right after `router.handshake.meet`.

    None where that cannot be: if the host has none to offer, in another container, or on a system without anonymous
    files.

    Args:
        size: what the host offers, and the guest expects.

    Raises: OSError if the other end is gone, or does not answer in time.
    """
    deadline_s = time.monotonic() + connect_s
    if rank == HOST_SIDE:
        return _offer(connection, size, deadline_s)
    offered, process, descriptor, token = _OFFER.unpack(read_exactly(connection, _OFFER.size, deadline_s))
    memory = _find(process, descriptor, token, size) if offered == size > 0 else None
    connection.sendall(_NO if memory is None else _YES)
    return memory


def _offer(connection: socket.socket, size: int, deadline_s: float) -> mmap.mmap | None:
    memory, token = None, secrets.token_bytes(32)
    with contextlib.ExitStack() as until_answered:
        descriptor = -1
        # Systems but Linux have no such files; of nothing there is no memory.
        with contextlib.suppress(OSError, AttributeError, ValueError):
            descriptor = os.memfd_create("octet-lane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            until_answered.callback(os.close, descriptor)
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _seals())
            memory = mmap.mmap(descriptor, size)
            memory[: len(token)] = token
        offer = _OFFER.pack(0 if memory is None else size, os.getpid(), descriptor, token)
        connection.sendall(offer)
        return memory if read_exactly(connection, 1, deadline_s) == _YES else None


def _find(process: int, descriptor: int, token: bytes, size: int) -> mmap.mmap | None:
    """Another process's memory of this size. What has the same number in another container is not it."""
    try:
        file = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        # Of memory that may shrink a page could vanish while it is read.
        if os.fstat(file).st_size != size or fcntl.fcntl(file, fcntl.F_GET_SEALS) & _seals() != _seals():
            return None
        memory = mmap.mmap(file, size)
    except (OSError, ValueError):
        return None
    finally:
        os.close(file)
    return memory if secrets.compare_digest(memory[: len(token)], token) else None


def _seals() -> int:
    return fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
