"""Wires: how they are formed, and frames that are longer than what the system holds."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import random
import signal
import socket
import struct
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import ExpertMissingError, LaneError, LaneTimeoutError, PeerLostError, WrongEpochError
from octet.ids import Epoch
from ops.chaos.observe import num_ports
from router.frames import MAGIC, FrameLayout, Kind, new_frames
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.lane import LaneExchange, LanePort
from router.link import Link, shared_bytes
from router.plan import PlanByShard, ShardPlan
from router.wire import Wire
from tests.exchange_conformance import CONNECT_S, EPOCH, HOST, MARGIN_S, PATIENT_S, SECRET, form_pair, next_call, within
from tests.unit.router.wires import hearing

LONG = FrameLayout(hidden_size=4096, experts_per_token=4, max_rows=1024, dtype=torch.float32)
"""16 MiB: more than the system holds of a connection whose other end does not read."""


@pytest.mark.parametrize("rank", [HOST_SIDE, GUEST_SIDE])
def test_a_wire_that_nobody_else_joins_is_given_up_and_leaves_no_port_open(rank: int) -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    gc.collect()
    before = num_ports([os.getpid()])
    with pytest.raises(LaneTimeoutError, match=f"rank {rank}") as kept:
        Wire.join(store, "alone", rank, HOST, connect_s=0.3, timeout_s=1.0)
    assert kept.value.__traceback__ is not None
    # Ports of earlier tests may be closed meanwhile.
    assert num_ports([os.getpid()]) <= before


@pytest.mark.parametrize(("near", "within_host"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_a_wire_knows_whether_its_ends_are_on_one_machine(near: str, within_host: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = socket.create_connection(server.getsockname(), CONNECT_S, source_address=(near, 0))
        there, _ = server.accept()
        assert [Wire(end, 1.0).within_host for end in (connection, there)] == [within_host] * 2


@pytest.mark.parametrize(("near", "shares"), [("127.0.0.1", True), ("127.0.0.2", False)])
def test_memory_is_shared_on_one_machine_alone(near: str, shares: bool) -> None:
    """By its address: hosts that are network namespaces are told apart as machines are."""
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    joined, size = GroupStore.join(store.address, CONNECT_S, SECRET), 4096
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(Wire.join, store, "wire", HOST_SIDE, near, CONNECT_S, PATIENT_S, size)
        guest = Wire.join(joined, "wire", GUEST_SIDE, HOST, CONNECT_S, PATIENT_S, size)
        assert [wire.shared is not None for wire in (host.result(), guest)] == [shares] * 2


def test_strangers_that_knock_are_turned_away() -> None:
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    stores = [store, GroupStore.join(store.address, CONNECT_S, SECRET)]
    name = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as closing:
        host = pool.submit(Wire.join, stores[0], name, HOST_SIDE, HOST, CONNECT_S, PATIENT_S)
        port = int(stores[1].look_up(name, CONNECT_S).split(b" ")[1])
        for greeting in (b"GET / HTTP/1.1\r\nHost: octet\r\n\r\n", b"", bytes(64)):
            stranger = closing.enter_context(socket.create_connection((HOST, port)))
            assert len(stranger.recv(32, socket.MSG_WAITALL)) == 32
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
        guest = Wire.join(stores[1], name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        ends = host.result(), guest
    assert stores[0].num_refused == 3
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=2, dtype=torch.float32)
    LaneExchange([Link(ends[0], layout, EPOCH)]).close()
    assert LanePort(ends[1], layout, EPOCH, PATIENT_S).receive() is None


def test_silent_strangers_hold_up_no_member(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.handshake._KNOCK_S", 10 * CONNECT_S)
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    joined = GroupStore.join(store.address, CONNECT_S, SECRET)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as closing:
        host = pool.submit(Wire.join, store, name, HOST_SIDE, HOST, CONNECT_S, PATIENT_S)
        port = int(joined.look_up(name, CONNECT_S).split(b" ")[1])
        # More than may wait at once.
        strangers = [closing.enter_context(socket.create_connection((HOST, port))) for _ in range(150)]
        assert len(strangers[-1].recv(32, socket.MSG_WAITALL)) == 32
        guest = Wire.join(joined, name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        assert host.result().fd != guest.fd
    assert 22 <= store.num_refused <= 23


def test_a_stranger_that_says_little_by_little_is_turned_away_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.handshake._KNOCK_S", 0.3)
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    joined = GroupStore.join(store.address, CONNECT_S, SECRET)
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(Wire.join, store, name, HOST_SIDE, HOST, 1.5, PATIENT_S)
        port = int(joined.look_up(name, CONNECT_S).split(b" ")[1])
        with socket.create_connection((HOST, port)) as stranger, contextlib.suppress(ConnectionError):
            for _ in range(63):
                stranger.sendall(b"x")
                time.sleep(0.1)
            pytest.fail("it was listened to for six seconds")
        with pytest.raises(LaneTimeoutError, match="nobody joined"):
            host.result()
    assert store.num_refused == 1


def test_a_host_that_says_little_by_little_is_given_up_in_time() -> None:
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool, socket.create_server((HOST, 0)) as listener:
        store.publish(name, f"{HOST} {listener.getsockname()[1]}".encode())
        guest = pool.submit(Wire.join, store, name, GUEST_SIDE, HOST, 0.5, PATIENT_S)
        connection, _ = listener.accept()
        with connection:
            started_s = time.monotonic()
            while not guest.done() and time.monotonic() - started_s < 5:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b"x")
                time.sleep(0.2)
            assert guest.done()
            with pytest.raises(LaneTimeoutError):
                guest.result()


def test_whoever_hands_a_proof_back_is_turned_away() -> None:
    """It opens a connection of its own to a host, and lets the host answer the challenge of another connection."""
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        host = pool.submit(Wire.join, store, name, HOST_SIDE, HOST, 3.0, PATIENT_S)
        # A client of a store does one thing at a time.
        joined = GroupStore.join(store.address, CONNECT_S, SECRET)
        port = int(joined.look_up(name, CONNECT_S).split(b" ")[1])
        with socket.create_connection((HOST, port)) as stranger:
            challenge = stranger.recv(32, socket.MSG_WAITALL)
            # A proof for the other end, of the very nonces: all that a stranger could have been shown.
            mirrored = SECRET.sign("wire host", name.encode() + challenge + challenge)
            stranger.sendall(challenge + mirrored)
            assert stranger.recv(1) == b""
        with pytest.raises(LaneTimeoutError, match="nobody joined"):
            host.result()
    assert store.num_refused == 1


@pytest.mark.parametrize("lie", ["127.0.0.1 1", "00" * 40, "no hex"])
def test_what_a_stranger_writes_into_the_store_leads_nobody_anywhere(lie: str) -> None:
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    store.prefix(name).set("value", lie)
    with pytest.raises(LaneTimeoutError, match="not signed by a member"):
        Wire.join(store, name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)


def test_a_host_that_cannot_prove_itself_is_not_believed() -> None:
    """A stranger took the port that a member had published."""
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool, socket.create_server((HOST, 0)) as listener:
        store.publish(name, f"{HOST} {listener.getsockname()[1]}".encode())
        guest = pool.submit(Wire.join, store, name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(bytes(32))
            connection.recv(64, socket.MSG_WAITALL)
            connection.sendall(bytes(32))
            with pytest.raises(LaneTimeoutError, match="a stranger answered"):
                guest.result()


def test_a_step_that_waits_for_a_shard_that_is_cut_off_ends_when_it_is_given_up() -> None:
    """Nothing comes of it, and no end of the connection either."""
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=2, dtype=torch.float32)
    worker, _shard = form_pair(PATIENT_S)
    link = Link(worker, layout, EPOCH)
    exchange = LaneExchange([link])
    x_TH = torch.randn(layout.max_rows, layout.hidden_size)
    with ThreadPoolExecutor(1) as pool, within(MARGIN_S):
        step = pool.submit(exchange.receive, exchange.send(0, x_TH, PlanByShard((_everything(layout),))), x_TH)
        with pytest.raises(TimeoutError):
            step.result(0.1)
        link.abort()
        with pytest.raises(LaneError, match="given the wire up"):
            step.result()


def test_long_frames_hold_up_neither_end_before_it_has_to_wait() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange, port = LaneExchange([Link(worker, LONG, EPOCH)]), LanePort(shard, LONG, EPOCH, PATIENT_S)
    x_TH = torch.randn(LONG.max_rows, LONG.hidden_size)
    plan = PlanByShard((_everything(LONG),))
    with ThreadPoolExecutor(1) as pool:

        def answer_two() -> None:
            for _ in range(2):
                call = next_call(port)
                port.reply(call, call.rows.x_UH * (call.layer + 1))
            assert port.receive() is None

        # Nobody reads yet, and one of the shard's replies is not read while another call is sent.
        ticket = exchange.send(0, x_TH, plan)
        served = pool.submit(answer_two)
        following = exchange.send(1, x_TH, plan)
        for layer, sent in enumerate((ticket, following)):
            y_TH = torch.zeros_like(x_TH)
            exchange.receive(sent, y_TH)
            assert torch.equal(y_TH, x_TH * (layer + 1))
        exchange.close()
        served.result(PATIENT_S)


def test_a_long_reply_goes_behind_one_that_is_not_read_yet() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange, port = LaneExchange([Link(worker, LONG, EPOCH)]), LanePort(shard, LONG, EPOCH, PATIENT_S)
    x_TH = torch.randn(LONG.max_rows, LONG.hidden_size)
    plan = PlanByShard((_everything(LONG),))
    with ThreadPoolExecutor(1) as pool:

        def answer_both_at_last() -> None:
            calls = [next_call(port) for _ in range(2)]
            # Views of the inbox, which the answers do not touch.
            for call in calls:
                port.reply(call, call.rows.x_UH * (call.layer + 1))
            assert port.receive() is None

        served = pool.submit(answer_both_at_last)
        tickets = [exchange.send(layer, x_TH, plan) for layer in range(2)]
        for layer, ticket in enumerate(tickets):
            y_TH = torch.zeros_like(x_TH)
            exchange.receive(ticket, y_TH)
            assert torch.equal(y_TH, x_TH * (layer + 1))
        exchange.close()
        served.result(PATIENT_S)


def test_a_link_that_closes_says_so_and_breaks_its_connection() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange = LaneExchange([Link(worker, LONG, EPOCH)])
    exchange.close()
    assert LanePort(shard, LONG, EPOCH, PATIENT_S).receive() is None
    # A shard that never reads again holds no port of the worker's open.
    with within(MARGIN_S):
        assert os.read(shard.fd, 1) == b""


def test_few_rows_go_behind_a_long_frame_that_is_not_taken_yet() -> None:
    """What compiled code sends and waits for at all shards, beside what is sent to each."""
    pairs = [form_pair(PATIENT_S) for _ in range(2)]
    exchange = LaneExchange([Link(worker, LONG, EPOCH) for worker, _ in pairs])
    x_TH = torch.randn(LONG.max_rows, LONG.hidden_size)
    rounds = [PlanByShard((_everything(LONG), None)), *[PlanByShard((_everything(LONG, 3),) * 2)] * 3]
    with ThreadPoolExecutor(2) as pool:

        def answer(port: LanePort, factor: int) -> None:
            while (call := port.receive()) is not None:
                port.reply(call, call.rows.x_UH * (call.layer + factor))

        tickets = [exchange.send(0, x_TH, rounds[0])]
        served = [
            pool.submit(answer, LanePort(wire, LONG, EPOCH, PATIENT_S), 1 + n) for n, (_, wire) in enumerate(pairs)
        ]
        for layer, plan in enumerate(rounds[1:], start=1):
            tickets.append(exchange.send(layer, x_TH[:3], plan))
            first = tickets.pop(0)
            y_TH = torch.zeros(LONG.max_rows if first.layer == 0 else 3, LONG.hidden_size)
            exchange.receive(first, y_TH)
            factor = 1 if first.layer == 0 else 2 * first.layer + 3
            torch.testing.assert_close(y_TH, x_TH[: len(y_TH)] * factor)
        exchange.receive(tickets[0], torch.zeros(3, LONG.hidden_size))
        exchange.close()
        for future in served:
            future.result(PATIENT_S)


def test_a_worker_that_dies_within_a_frame_is_noticed_at_once() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange = LaneExchange([Link(worker, LONG, EPOCH)])
    exchange.send(0, torch.zeros(LONG.max_rows, LONG.hidden_size), PlanByShard((_everything(LONG),)))
    worker.abort()
    with within(MARGIN_S), pytest.raises(PeerLostError):
        LanePort(shard, LONG, EPOCH, PATIENT_S).receive()


def test_a_shard_that_closes_before_it_has_read_a_frame_is_noticed_at_once() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange = LaneExchange([Link(worker, LONG, EPOCH)])
    x_TH = torch.zeros(LONG.max_rows, LONG.hidden_size)
    ticket = exchange.send(0, x_TH, PlanByShard((_everything(LONG),)))
    shard.abort()
    with within(MARGIN_S), pytest.raises(PeerLostError, match="shard 0"):
        exchange.receive(ticket, torch.zeros_like(x_TH))


def test_a_thread_that_waits_hears_that_its_own_end_was_given_up() -> None:
    _, shard = form_pair(PATIENT_S)
    port = LanePort(shard, LONG, EPOCH, PATIENT_S)
    threading.Timer(0.1, port.close).start()
    with within(MARGIN_S), pytest.raises(LaneError, match="this end"):
        port.receive()


def test_a_signal_ends_no_wait() -> None:
    """Profilers send many of them, and Python's handlers do not let the system's calls go on by themselves."""
    worker, shard = form_pair(PATIENT_S)
    port, before = LanePort(shard, LONG, EPOCH, PATIENT_S), signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(port.receive)
            (thread,) = pool._threads
            for _ in range(5):
                time.sleep(0.02)
                signal.pthread_kill(thread.ident or 0, signal.SIGUSR1)
            assert not waiting.done()
            LaneExchange([Link(worker, LONG, EPOCH)]).send(
                3, torch.zeros(1, LONG.hidden_size), PlanByShard((_everything(LONG, 1),))
            )
            call = waiting.result(PATIENT_S)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert call is not None
    assert call.layer == 3


def test_a_frame_that_says_that_it_is_too_long_is_none() -> None:
    worker, shard = form_pair(PATIENT_S)
    small = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=2, dtype=torch.float32)
    LaneExchange([Link(worker, LONG, EPOCH)]).send(
        0, torch.zeros(LONG.max_rows, LONG.hidden_size), PlanByShard((_everything(LONG),))
    )
    with within(MARGIN_S), pytest.raises(LaneError, match="not a frame"):
        LanePort(shard, small, EPOCH, PATIENT_S).receive()


@pytest.mark.parametrize("payload_bytes", [-1, -64, -(2**62)])
def test_a_frame_that_says_that_it_is_shorter_than_its_header_is_none(payload_bytes: int) -> None:
    """What follows would be read beyond the frame."""
    sent = _frame((MAGIC, Kind.CALL, EPOCH, 0, 0, 1, payload_bytes, 0), random.randbytes(200))
    with hearing(sent, HOST, PATIENT_S) as wire, within(MARGIN_S), pytest.raises(LaneError, match="not a frame"):
        LanePort(wire, LONG, EPOCH, PATIENT_S).receive()


def test_a_call_of_other_rows_than_agreed_on_is_refused() -> None:
    worker, shard = form_pair(PATIENT_S)
    narrow, wide = (
        FrameLayout(hidden_size=hidden, experts_per_token=2, max_rows=4, dtype=torch.float32) for hidden in (8, 16)
    )
    LaneExchange([Link(worker, narrow, EPOCH)]).send(0, torch.zeros(3, 8), PlanByShard((_everything(narrow, 3),)))
    with pytest.raises(LaneError, match="not a call: a CALL of 3 rows"):
        LanePort(shard, wide, Epoch(EPOCH), PATIENT_S).receive()


@pytest.mark.parametrize("shares", [False, True])
def test_of_rows_in_shared_memory_the_header_alone_is_sent(shares: bool) -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=4, dtype=torch.float32)
    worker, shard = form_pair(PATIENT_S, shared_bytes(layout) if shares else 0)
    LaneExchange([Link(worker, layout, EPOCH)]).send(0, torch.zeros(4, 8), PlanByShard((_everything(layout),)))
    assert len(os.read(shard.fd, 4096)) == (64 if shares else 64 + 4 * (8 + 2 * 2) * 4)


@pytest.mark.parametrize("num_rows", [3, 5, -1])
def test_a_call_whose_rows_are_said_to_be_in_memory_that_is_not_shared_is_refused(num_rows: int) -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=4, dtype=torch.float32)
    header = _frame((MAGIC, 1, EPOCH, 0, 0, num_rows, 0, 2), b"")
    with hearing(header, HOST, PATIENT_S) as wire, pytest.raises(LaneError, match=r"not a call: .* in shared memory"):
        LanePort(wire, layout, EPOCH, PATIENT_S).receive()
    shared = mmap.mmap(-1, shared_bytes(layout))
    with hearing(header, HOST, PATIENT_S, shared) as wire:
        port = LanePort(wire, layout, EPOCH, PATIENT_S)
        if 0 <= num_rows <= layout.max_rows:
            assert next_call(port).rows.x_UH.shape == (num_rows, 8)
            return
        with pytest.raises(LaneError, match=f"not a call: a CALL of {num_rows} rows"):
            port.receive()


def test_memory_of_another_size_than_the_frames_is_refused() -> None:
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=4, dtype=torch.float32)
    for end in form_pair(PATIENT_S, shared_bytes(layout) + 64):
        with pytest.raises(LaneError, match="bytes of shared memory, expected"):
            Link(end, layout, EPOCH)
        with pytest.raises(LaneError, match="bytes of shared memory, expected"):
            LanePort(end, layout, EPOCH, PATIENT_S)


def test_frames_begin_where_their_header_may() -> None:
    frames = new_frames(FrameLayout(hidden_size=3, experts_per_token=1, max_rows=1, dtype=torch.float32), 3)
    assert all(frame.ctypes.data % 8 == frames.ctypes.data % 8 for frame in frames)


def test_silence_in_the_middle_of_a_frame_ends_at_the_deadline() -> None:
    timeout_s = 0.5
    worker, shard = form_pair(timeout_s)
    port = LanePort(shard, LONG, EPOCH, timeout_s)
    # A header that promises more than what follows.
    frame = new_frames(LONG, 1)[0].view("u1")
    frame[:64].view("i8")[:] = [0x4F43544554, 1, EPOCH, 0, 0, 2, 4096, 0]
    os.write(worker.fd, frame[:64].tobytes())
    start_s = time.monotonic()
    with within(timeout_s + MARGIN_S), pytest.raises(LaneTimeoutError):
        port.receive()
    assert time.monotonic() - start_s > 0.9 * timeout_s


def _everything(layout: FrameLayout, num_rows: int | None = None) -> ShardPlan:
    shape = (num_rows or layout.max_rows, layout.experts_per_token)
    return ShardPlan(
        rows_U=torch.arange(shape[0]), slots_UK=torch.zeros(shape, dtype=torch.int32), weights_UK=torch.ones(shape)
    )


def _frame(header: tuple[int, ...], payload: bytes) -> bytes:
    return struct.pack("<8q", *header) + payload


_numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300)
_headers = st.tuples(st.just(MAGIC), st.integers(0, 8), st.just(EPOCH), *[_numbers] * 4, st.integers(0, 4))
_anything = st.binary(max_size=300) | st.builds(_frame, _headers, st.binary(max_size=300))


@given(
    sent=_anything,
    to_shard=st.booleans(),
    shares=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_whatever_comes_over_a_wire_is_a_frame_or_a_typed_error(
    sent: bytes, to_shard: bool, shares: bool, dtype: torch.dtype
) -> None:
    """Raw bytes, and headers of every kind with any numbers in them: neither end fails otherwise, or waits."""
    layout = FrameLayout(hidden_size=8, experts_per_token=2, max_rows=3, dtype=dtype)
    shared = mmap.mmap(-1, shared_bytes(layout)) if shares else None
    with hearing(sent, HOST, PATIENT_S, shared) as wire:
        with contextlib.suppress(LaneError, ExpertMissingError, WrongEpochError):
            if to_shard:
                call = LanePort(wire, layout, EPOCH, PATIENT_S).receive()
                assert call is None or call.rows.x_UH.shape == (len(call.rows.slots_UK), layout.hidden_size)
            else:
                Link(wire, layout, EPOCH).receive(0, np.arange(3), torch.zeros(3, layout.hidden_size))
        wire.abort()
