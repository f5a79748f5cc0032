"""How two ends meet: what a stranger between them can do, and what is left of a meeting that failed."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import struct
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from octet.errors import LaneTimeoutError, PeerLostError
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE, meet
from router.wire import Wire
from tests.exchange_conformance import CONNECT_S, HOST, MARGIN_S, PATIENT_S, SECRET, form_pair, within

MEET_S = 1.5
"""A deadline that a test waits for."""


@pytest.fixture
def stores() -> list[GroupStore]:
    """Of the host and of two guests, as each does one thing at a time."""
    host = GroupStore.host(HOST, CONNECT_S, SECRET)
    return [host, *[GroupStore.join(host.address, CONNECT_S, SECRET) for _ in range(2)]]


@contextlib.contextmanager
def posing(store: GroupStore, name: str) -> Iterator[socket.socket]:
    """A stranger has taken the port that a member had published."""
    with socket.create_server((HOST, 0)) as listener:
        store.publish(name, f"{HOST} {listener.getsockname()[1]}".encode())
        listener.settimeout(PATIENT_S)
        yield listener


def num_sockets() -> int:
    """Of this process."""
    gc.collect()
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(str(path.readlink()).startswith("socket:") for path in links)


def heard(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer if the other end closes before."""
    connection.settimeout(PATIENT_S)
    with contextlib.suppress(ConnectionResetError):
        return connection.recv(size, socket.MSG_WAITALL)
    return b""


def test_a_guest_of_one_wire_cannot_be_handed_on_to_the_host_of_another(stores: list[GroupStore]) -> None:
    one, other = uuid.uuid4().hex, uuid.uuid4().hex
    with ThreadPoolExecutor(2) as pool, posing(stores[0], other) as listener:
        host = pool.submit(Wire.join, stores[0], one, HOST_SIDE, HOST, MEET_S, PATIENT_S)
        port = int(stores[1].look_up(one, CONNECT_S).split(b" ")[1])
        guest = pool.submit(Wire.join, stores[1], other, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        near, _ = listener.accept()
        with near, socket.create_connection((HOST, port)) as far:
            near.sendall(heard(far, 32))
            far.sendall(heard(near, 64))
            assert heard(far, 32) == b""
        for end in (host, guest):
            with pytest.raises(LaneTimeoutError):
                end.result(PATIENT_S)
    assert stores[0].num_refused == 1


def test_what_a_host_has_said_once_is_believed_by_no_other_guest(stores: list[GroupStore]) -> None:
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(Wire.join, stores[0], name, HOST_SIDE, HOST, CONNECT_S, PATIENT_S)
        port = int(stores[1].look_up(name, CONNECT_S).split(b" ")[1])
        with posing(stores[1], name) as listener:
            guest = pool.submit(Wire.join, stores[1], name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
            near, _ = listener.accept()
            with near, socket.create_connection((HOST, port)) as far:
                nonce = heard(far, 32)
                near.sendall(nonce)
                far.sendall(heard(near, 64))
                proof = heard(far, 32)
                near.sendall(proof)
                assert len(proof) == 32
                for end in (host, guest):
                    end.result(PATIENT_S).abort()
            another = pool.submit(Wire.join, stores[2], name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
            near, _ = listener.accept()
            with near:
                near.sendall(nonce)
                heard(near, 64)
                near.sendall(proof)
                with pytest.raises(LaneTimeoutError, match="a stranger answered"):
                    another.result(PATIENT_S)


def test_a_guest_is_not_convinced_by_its_own_proof(stores: list[GroupStore]) -> None:
    name = uuid.uuid4().hex
    before = num_sockets()
    with ThreadPoolExecutor(1) as pool, posing(stores[0], name) as listener:
        guest = pool.submit(Wire.join, stores[1], name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        near, _ = listener.accept()
        with near:
            near.sendall(bytes(32))
            near.sendall(heard(near, 64)[32:])
            with pytest.raises(LaneTimeoutError, match="a stranger answered") as kept:
                guest.result(PATIENT_S)
    assert kept.value.__traceback__ is not None
    assert num_sockets() <= before


@pytest.mark.parametrize("rank", [HOST_SIDE, GUEST_SIDE])
def test_an_end_that_is_left_alone_before_memory_is_shared_hears_of_it_and_leaves_no_port_open(
    rank: int, stores: list[GroupStore]
) -> None:
    name, before = uuid.uuid4().hex, num_sockets()
    with ThreadPoolExecutor(2) as pool, within(MARGIN_S + PATIENT_S):
        joining = pool.submit(Wire.join, stores[rank], name, rank, HOST, CONNECT_S, PATIENT_S, 4096)
        pool.submit(meet, stores[1 - rank], name, 1 - rank, HOST, CONNECT_S).result(PATIENT_S).close()
        with pytest.raises(LaneTimeoutError, match=f"rank {rank} was left alone") as kept:
            joining.result(PATIENT_S)
    assert kept.value.__traceback__ is not None
    assert num_sockets() <= before


@pytest.mark.parametrize("rank", [HOST_SIDE, GUEST_SIDE])
def test_an_end_that_waits_for_shared_memory_in_vain_is_given_up_at_the_deadline(
    rank: int, stores: list[GroupStore]
) -> None:
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(2) as pool, within(PATIENT_S):
        joining = pool.submit(Wire.join, stores[rank], name, rank, HOST, MEET_S, PATIENT_S, 4096)
        other = pool.submit(meet, stores[1 - rank], name, 1 - rank, HOST, CONNECT_S).result(PATIENT_S)
        with other, pytest.raises(LaneTimeoutError, match=f"rank {rank} was left alone: timed out"):
            joining.result(PATIENT_S)


def test_ends_may_meet_at_an_ipv6_address(stores: list[GroupStore]) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(Wire.join, stores[0], name, HOST_SIDE, "::1", CONNECT_S, PATIENT_S)
        guest = Wire.join(stores[1], name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        host = joining.result(PATIENT_S)
    host.send(memoryview(b"frame"), until_s=time.monotonic() + PATIENT_S)
    guest.receive_into(memoryview(room := bytearray(5)), time.monotonic() + PATIENT_S)
    assert room == b"frame"
    assert host.within_host
    assert guest.within_host


def test_small_frames_are_not_held_back_for_others_to_go_with_them() -> None:
    for wire in form_pair(PATIENT_S):
        with socket.socket(fileno=os.dup(wire.fd)) as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


def test_of_a_connection_that_is_lost_already_one_hears_where_it_is_used() -> None:
    with socket.create_server((HOST, 0)) as listener:
        connection = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    # Reset, and not closed in good order.
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    assert poll.poll(1000 * PATIENT_S)
    wire = Wire(connection, PATIENT_S)
    with within(MARGIN_S), pytest.raises(PeerLostError):
        wire.receive_into(memoryview(bytearray(1)), time.monotonic() + PATIENT_S)
