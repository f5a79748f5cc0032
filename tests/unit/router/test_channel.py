from __future__ import annotations

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import signal
import socket
import struct
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octet.errors import LaneError, LaneTimeoutError, PeerLostError, WrongEpochError
from octet.ids import Epoch
from router.channel import KvChannel, LocalChannel, WireChannel
from router.frames import HEADER_BYTES, MAGIC, Kind
from router.group_store import GroupStore
from router.handshake import GUEST_SIDE, HOST_SIDE
from router.wire import Wire
from tests.exchange_conformance import CONNECT_S, HOST, MARGIN_S, PATIENT_S, SECRET, SHORT_S, form_pair, within
from tests.unit.router.wires import hearing

EPOCH = Epoch(2)
LONG = 64 * 2**20
"""More bytes than the system holds of a connection whose other end does not read."""


@dataclasses.dataclass(frozen=True)
class Ends:
    prefill: KvChannel
    decode: KvChannel


Open = Callable[[float], AbstractContextManager[Ends]]


@contextlib.contextmanager
def local(timeout_s: float) -> Iterator[Ends]:
    channel = LocalChannel(timeout_s)
    yield Ends(channel, channel)


@contextlib.contextmanager
def wire(timeout_s: float, decode_epoch: Epoch = EPOCH) -> Iterator[Ends]:
    source, target = form_pair(timeout_s)
    ends = Ends(WireChannel(source, EPOCH), WireChannel(target, decode_epoch))
    try:
        yield ends
    finally:
        ends.prefill.close()
        ends.decode.close()


@pytest.fixture(params=[local, wire])
def open_channel(request: pytest.FixtureRequest) -> Open:
    opens: Open = request.param
    return opens


def transfer(ends: Ends, pages: torch.Tensor | None, expected_bytes: int) -> torch.Tensor | None:
    with ThreadPoolExecutor(1) as pool:
        sent = pool.submit(ends.prefill.send, pages)
        try:
            return ends.decode.receive(expected_bytes)
        finally:
            sent.result(PATIENT_S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_arrive_as_they_were_sent(open_channel: Open, dtype: torch.dtype) -> None:
    pages = torch.randn(3, 2, 5, 4, 2, 8).to(dtype)
    with open_channel(PATIENT_S) as ends:
        arrived = transfer(ends, pages, pages.nbytes)
    assert arrived is not None
    assert torch.equal(arrived.view(dtype).view(pages.shape), pages)


def test_a_part_longer_than_the_system_holds_arrives_as_it_was_sent(open_channel: Open) -> None:
    pages = torch.randint(256, (LONG,), dtype=torch.uint8)
    with open_channel(PATIENT_S) as ends:
        arrived = transfer(ends, pages, LONG)
    assert arrived is not None
    assert torch.equal(arrived, pages)


def test_a_lease_that_is_gone_arrives_as_none(open_channel: Open) -> None:
    with open_channel(PATIENT_S) as ends:
        assert transfer(ends, None, 4096) is None


def test_a_channel_carries_one_answer_after_another(open_channel: Open) -> None:
    answers = [torch.randn(16), None, torch.randn(1), torch.randn(64)]
    with open_channel(PATIENT_S) as ends:
        for answer in answers:
            arrived = transfer(ends, answer, 4 if answer is None else answer.nbytes)
            assert (arrived is None) == (answer is None)
            if arrived is not None and answer is not None:
                assert torch.equal(arrived.view(torch.float32), answer)


def test_fewer_pages_than_expected_are_refused(open_channel: Open) -> None:
    with open_channel(PATIENT_S) as ends, pytest.raises(LaneError, match="bytes"):
        transfer(ends, torch.zeros(8), 64)


def test_a_silent_peer_is_given_up_at_the_deadline(open_channel: Open) -> None:
    with open_channel(SHORT_S) as ends, within(SHORT_S + MARGIN_S), pytest.raises(LaneTimeoutError):
        ends.decode.receive(64)


def test_a_peer_that_does_not_read_is_given_up_at_the_deadline() -> None:
    with wire(SHORT_S) as ends, within(SHORT_S + MARGIN_S), pytest.raises(LaneTimeoutError):
        ends.prefill.send(torch.zeros(LONG, dtype=torch.uint8))


def test_within_a_process_a_peer_that_takes_nothing_is_given_up_at_the_deadline() -> None:
    channel = LocalChannel(SHORT_S)
    channel.send(torch.zeros(8))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(channel.send, torch.zeros(8))
        try:
            with pytest.raises(LaneTimeoutError, match="not taken"):
                second.result(PATIENT_S)
        finally:
            channel.receive(32)


def test_a_peer_that_sends_little_by_little_is_given_up_at_the_deadline() -> None:
    source, target = form_pair(SHORT_S)
    channel = WireChannel(target, EPOCH)
    with ThreadPoolExecutor(1) as pool, within(SHORT_S + MARGIN_S):
        receiving = pool.submit(channel.receive, LONG)
        with contextlib.suppress(OSError):
            while not receiving.done():
                os.write(source.fd, _frame(Kind.PAGES, EPOCH, LONG)[:HEADER_BYTES])
                time.sleep(SHORT_S / 10)
        with pytest.raises(LaneTimeoutError):
            receiving.result()


def test_what_was_sent_before_a_channel_was_closed_is_received() -> None:
    pages = torch.randn(4096)
    with wire(PATIENT_S) as ends:
        ends.prefill.send(pages)
        ends.prefill.close()
        arrived = ends.decode.receive(pages.nbytes)
        assert arrived is not None
        assert torch.equal(arrived.view(torch.float32), pages)
        with within(MARGIN_S), pytest.raises(PeerLostError):
            ends.decode.receive(64)


def test_a_peer_that_closes_is_noticed_at_once_by_who_receives() -> None:
    with wire(PATIENT_S) as ends:
        ends.prefill.close()
        with within(MARGIN_S), pytest.raises(PeerLostError):
            ends.decode.receive(64)


@pytest.mark.parametrize("size", [8, LONG])
def test_a_peer_that_closes_is_noticed_at_once_by_who_sends(size: int) -> None:
    with wire(PATIENT_S) as ends:
        ends.decode.close()
        with within(MARGIN_S), pytest.raises(PeerLostError):
            ends.prefill.send(torch.zeros(size, dtype=torch.uint8))


def test_a_peer_that_closes_while_it_is_sent_to_is_noticed_at_once() -> None:
    with wire(PATIENT_S) as ends, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ends.prefill.send, torch.zeros(LONG, dtype=torch.uint8))
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        ends.decode.close()
        with within(MARGIN_S), pytest.raises(PeerLostError):
            waiting.result(PATIENT_S)


@pytest.mark.parametrize("end", ["prefill", "decode"])
def test_closing_frees_who_waits_at_the_same_end(end: str) -> None:
    with wire(PATIENT_S) as ends, ThreadPoolExecutor(1) as pool:
        if end == "prefill":
            waiting: Future[object] = pool.submit(ends.prefill.send, torch.zeros(LONG, dtype=torch.uint8))
        else:
            waiting = pool.submit(ends.decode.receive, LONG)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        (ends.prefill if end == "prefill" else ends.decode).close()
        with within(MARGIN_S), pytest.raises(LaneError, match="this end"):
            waiting.result(PATIENT_S)


def test_pages_of_another_epoch_are_recognised() -> None:
    with wire(PATIENT_S, decode_epoch=Epoch(9)) as ends, pytest.raises(WrongEpochError):
        transfer(ends, torch.zeros(16), 64)


@pytest.mark.parametrize("fault", ["lost", "silent", "rubbish", "epoch"])
def test_a_broken_channel_is_gone_with_its_last_owner_and_waits_for_no_garbage_collection(fault: str) -> None:
    source, target = form_pair(SHORT_S)
    held, channel = weakref.ref(target), WireChannel(target, EPOCH)
    del target
    gc.disable()
    try:
        match fault:
            case "lost":
                source.abort()
            case "rubbish":
                os.write(source.fd, _frame(Kind.REPLY, EPOCH, 0))
            case "epoch":
                os.write(source.fd, _frame(Kind.PAGES, EPOCH + 1, 64))
        with contextlib.suppress(LaneError):
            channel.receive(64)
            pytest.fail("a broken channel still works")
        del channel
        assert held() is None, "its port stays open"
    finally:
        gc.enable()


# Whom it lets in, and what it believes.


def test_a_stranger_is_turned_away_and_a_member_who_comes_at_the_same_time_is_let_in() -> None:
    store, name = GroupStore.host(HOST, CONNECT_S, SECRET), uuid.uuid4().hex
    joined = GroupStore.join(store.address, CONNECT_S, SECRET)
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as closing:
        host = pool.submit(Wire.join, store, name, HOST_SIDE, HOST, CONNECT_S, PATIENT_S)
        port = int(joined.look_up(name, CONNECT_S).split(b" ")[1])
        silent, rude = (closing.enter_context(socket.create_connection((HOST, port))) for _ in range(2))
        rude.sendall(_frame(Kind.PAGES, EPOCH, 64))
        target = Wire.join(joined, name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S)
        ends, pages = Ends(WireChannel(host.result(), EPOCH), WireChannel(target, EPOCH)), torch.randn(16)
        arrived = transfer(ends, pages, pages.nbytes)
        assert arrived is not None
        assert torch.equal(arrived.view(torch.float32), pages)
        for stranger in (silent, rude):
            stranger.settimeout(MARGIN_S)
            with contextlib.suppress(ConnectionResetError):
                # The host's nonce, and nothing behind it.
                assert len(stranger.recv(HEADER_BYTES + 64, socket.MSG_WAITALL)) <= 32
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((HOST, port))


def _frame(kind: int, epoch: int, payload_bytes: int, payload: bytes = b"") -> bytes:
    return struct.pack("<8q", MAGIC, kind, epoch, 0, 0, 0, payload_bytes, 0) + payload


def receive_raw(sent: bytes, expected_bytes: int) -> torch.Tensor | None:
    """What a channel makes of these bytes, behind which the connection ends."""
    with hearing(sent, HOST, PATIENT_S) as wire:
        try:
            return WireChannel(wire, EPOCH).receive(expected_bytes)
        finally:
            wire.abort()


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"GET / HTTP/1.1\r\nHost: octet\r\n".ljust(HEADER_BYTES), "not a frame"),
        (_frame(Kind.PAGES, EPOCH, 2**62), "expected 16 bytes"),
        (_frame(Kind.PAGES, EPOCH, -1), "expected 16 bytes"),
        (_frame(Kind.PAGES, EPOCH, 15, bytes(15)), "expected 16 bytes"),
        (_frame(Kind.GONE, EPOCH, 16, bytes(16)), "expected 16 bytes"),
        (_frame(Kind.REPLY, EPOCH, 16, bytes(16)), "expected 16 bytes"),
        (_frame(99, EPOCH, 16, bytes(16)), "not a frame"),
        (_frame(Kind.PAGES, EPOCH, 16, bytes(15)), "closed"),
        (_frame(Kind.PAGES, EPOCH, 16)[:63], "closed"),
    ],
)
def test_what_is_not_expected_is_a_typed_error(sent: bytes, error: str) -> None:
    with within(MARGIN_S), pytest.raises(LaneError, match=error):
        receive_raw(sent, 16)


@pytest.mark.parametrize(
    ("first", "error"),
    [
        (_frame(Kind.HEARTBEAT, EPOCH, 0), "expected 16 bytes"),
        (_frame(99, EPOCH, 0), "not a frame"),
        (_frame(Kind.PAGES, EPOCH + 1, 0), "of epoch 3"),
    ],
    ids=["another kind", "no kind", "another epoch"],
)
def test_nothing_is_read_of_a_channel_behind_what_is_no_frame(first: bytes, error: str) -> None:
    source, target = form_pair(PATIENT_S)
    channel = WireChannel(target, EPOCH)
    os.write(source.fd, first + _frame(Kind.PAGES, EPOCH, 16, bytes(16)))
    with pytest.raises(LaneError, match=error):
        channel.receive(16)
    with pytest.raises(LaneError, match="this end"):
        channel.receive(16)
    with within(MARGIN_S), pytest.raises(PeerLostError):
        WireChannel(source, EPOCH).send(torch.zeros(16))


_numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 300)
_headers = st.builds(
    lambda *fields: struct.pack("<8q", *fields),
    st.just(MAGIC) | _numbers,
    st.integers(0, 8) | _numbers,
    st.just(EPOCH) | _numbers,
    *[_numbers] * 5,
)
_anything = st.binary(max_size=300) | st.builds(bytes.__add__, _headers, st.binary(max_size=300))


@given(sent=_anything, expected_bytes=st.integers(0, 300))
def test_whatever_comes_over_a_channel_is_what_was_asked_for_or_a_typed_error(sent: bytes, expected_bytes: int) -> None:
    with contextlib.suppress(LaneError):
        pages = receive_raw(sent, expected_bytes)
        assert pages is None or bytes(pages.numpy()) == sent[HEADER_BYTES : HEADER_BYTES + expected_bytes]


# Faults that only a process of its own can show.


def send_in_process(address: str, name: str, parts: int) -> None:
    """The whole life of a process that sends parts, and then waits."""
    store = GroupStore.join(address, CONNECT_S, SECRET)
    channel = WireChannel(Wire.join(store, name, GUEST_SIDE, HOST, CONNECT_S, PATIENT_S), EPOCH)
    for _ in range(parts):
        channel.send(torch.zeros(LONG, dtype=torch.uint8))


@contextlib.contextmanager
def channel_from_a_process(timeout_s: float) -> Iterator[tuple[WireChannel, BaseProcess]]:
    """A channel over which a first part has come from a process, and a second begins to."""
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    process = multiprocessing.get_context("spawn").Process(
        target=send_in_process, args=(store.address, "kv", 2), daemon=True
    )
    process.start()
    try:
        channel = WireChannel(Wire.join(store, "kv", HOST_SIDE, HOST, CONNECT_S, timeout_s), EPOCH)
        assert channel.receive(LONG) is not None
        yield channel, process
        channel.close()
    finally:
        process.kill()
        process.join(PATIENT_S)
        process.close()


def test_a_process_that_is_killed_within_a_part_is_noticed_at_once() -> None:
    with channel_from_a_process(PATIENT_S) as (channel, process):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with within(MARGIN_S), pytest.raises(PeerLostError):
            channel.receive(LONG)


def test_a_process_that_is_stopped_within_a_part_is_given_up_at_the_deadline() -> None:
    timeout_s = 2.0
    with channel_from_a_process(timeout_s) as (channel, process):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        start_s = time.monotonic()
        with within(timeout_s + MARGIN_S), pytest.raises(LaneTimeoutError):
            channel.receive(LONG)
        assert time.monotonic() - start_s > 0.9 * timeout_s
