"""Memory of two ends: that it is the same, and what happens where it cannot be."""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from router.handshake import GUEST_SIDE, HOST_SIDE
from router.shared_memory import share
from tests.exchange_conformance import HOST, MARGIN_S, PATIENT_S, form_pair, within

SIZE = 3 * mmap.PAGESIZE


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server((HOST, 0)) as listener:
        guest = socket.create_connection(listener.getsockname())
        host, _ = listener.accept()
    with host, guest:
        yield host, guest


def both(
    ends: tuple[socket.socket, socket.socket], sizes: tuple[int, int] = (SIZE, SIZE)
) -> tuple[mmap.mmap | None, mmap.mmap | None]:
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(share, ends[0], HOST_SIDE, sizes[0], PATIENT_S)
        guest = share(ends[1], GUEST_SIDE, sizes[1], PATIENT_S)
        return host.result(), guest


def _answer(connection: socket.socket) -> None:
    memory = share(connection, GUEST_SIDE, SIZE, PATIENT_S)
    assert memory is not None
    connection.sendall(memory[-5:])
    connection.recv(1)
    memory[-5:] = b"there"
    connection.sendall(b"!")


def test_what_one_process_writes_the_other_reads(ends: tuple[socket.socket, socket.socket]) -> None:
    host, guest = ends
    other = multiprocessing.get_context("fork").Process(target=_answer, args=(guest,), daemon=True)
    with within(MARGIN_S + PATIENT_S):
        # It has to be another process's descriptor that is opened, and not one that was inherited.
        other.start()
        memory = share(host, HOST_SIDE, SIZE, PATIENT_S)
        assert memory is not None
        assert len(memory) == SIZE
        assert host.recv(5) == bytes(5)
        host.sendall(b"?")
        assert host.recv(1) == b"!"
        assert memory[-5:] == b"there"
        other.join()
    assert other.exitcode == 0


def no_files(name: str, flags: int) -> int:
    raise OSError("no such thing")


def another_file(name: str, flags: int) -> int:
    """What a descriptor's number means in another container."""
    return os.open(os.devnull, os.O_RDWR)


def test_memory_holds_descriptors_no_longer_than_it_is_held(ends: tuple[socket.socket, socket.socket]) -> None:
    before = _num_open()
    for memory in both(ends):
        assert memory is not None
        memory.close()
    assert _num_open() == before


@pytest.mark.parametrize("create", [no_files, another_file])
def test_without_such_files_both_ends_do_without(
    ends: tuple[socket.socket, socket.socket],
    create: Callable[[str, int], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "memfd_create", create)
    before = _num_open()
    assert both(ends) == (None, None)
    assert _num_open() == before


@pytest.mark.parametrize("sizes", [(SIZE, SIZE + mmap.PAGESIZE), (SIZE + mmap.PAGESIZE, SIZE), (0, SIZE)])
def test_ends_that_want_other_sizes_do_without(
    ends: tuple[socket.socket, socket.socket], sizes: tuple[int, int]
) -> None:
    assert both(ends, sizes) == (None, None)


def test_a_guest_takes_no_memory_but_the_one_it_was_offered(ends: tuple[socket.socket, socket.socket]) -> None:
    """In another container the same numbers may be those of other memory, of the same size."""
    host, guest = ends
    another = os.memfd_create("another", os.MFD_ALLOW_SEALING)
    os.ftruncate(another, SIZE)
    fcntl.fcntl(another, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    for token, expected in ((os.urandom(32), b"\0"), (bytes(32), b"\1")):
        host.sendall(struct.pack("<3q32s", SIZE, os.getpid(), another, token))
        memory = share(guest, GUEST_SIDE, SIZE, PATIENT_S)
        assert host.recv(1) == expected
        assert (memory is None) == (expected == b"\0")
    os.close(another)


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW])
def test_a_guest_takes_no_memory_whose_size_may_change(ends: tuple[socket.socket, socket.socket], seals: int) -> None:
    host, guest = ends
    offered, before = os.memfd_create("offered", os.MFD_ALLOW_SEALING), _num_open()
    os.ftruncate(offered, SIZE)
    fcntl.fcntl(offered, fcntl.F_ADD_SEALS, seals)
    host.sendall(struct.pack("<3q32s", SIZE, os.getpid(), offered, bytes(32)))
    assert share(guest, GUEST_SIDE, SIZE, PATIENT_S) is None
    assert host.recv(1) == b"\0"
    assert _num_open() == before
    os.close(offered)


def test_nobody_can_take_pages_of_it_away(ends: tuple[socket.socket, socket.socket]) -> None:
    memory = both(ends)[0]
    assert memory is not None
    with pytest.raises(OSError, match=r"resize|permitted"):
        memory.resize(SIZE - mmap.PAGESIZE)


@pytest.mark.parametrize("rank", [HOST_SIDE, GUEST_SIDE])
def test_who_is_left_alone_hears_of_it(ends: tuple[socket.socket, socket.socket], rank: int) -> None:
    ends[1 - rank].close()
    with within(MARGIN_S), pytest.raises(OSError, match=r"closed by peer|reset|Broken pipe"):
        share(ends[rank], rank, SIZE, PATIENT_S)


@pytest.mark.parametrize("rank", [HOST_SIDE, GUEST_SIDE])
def test_who_waits_in_vain_hears_of_it(ends: tuple[socket.socket, socket.socket], rank: int) -> None:
    with within(MARGIN_S), pytest.raises(TimeoutError):
        share(ends[rank], rank, SIZE, 0.2)


def test_it_is_gone_with_the_wires_that_have_it() -> None:
    wires = form_pair(PATIENT_S, SIZE)
    assert all(wire.shared is not None for wire in wires)
    assert _mapped() == 2
    del wires
    assert _mapped() == 0


def _num_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _mapped() -> int:
    return sum("memfd:octet-lane" in line for line in Path("/proc/self/maps").read_text().splitlines())
