"""Links and ports beyond the contract of exchanges: what goes behind what, who gives up when, and what is refused."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from octet.errors import ExpertMissingError, LaneError, LaneTimeoutError, PeerLostError
from router import link as links
from router.frames import HEADER_BYTES, FrameLayout, Header, Kind
from router.lane import LaneExchange, LanePort
from router.link import Link, shared_bytes
from router.plan import PlanByShard, ShardPlan
from tests.exchange_conformance import (
    EPOCH,
    HOST,
    MARGIN_S,
    PATIENT_S,
    SHORT_S,
    ByShard,
    Scale,
    assert_answered,
    form_pair,
    layout_of,
    next_call,
    random_rows,
    within,
)
from tests.unit.router.wires import hearing

LONG = FrameLayout(hidden_size=4096, experts_per_token=4, max_rows=1024, dtype=torch.float32)
"""16 MiB: more than the system holds of a connection whose other end does not read."""


def long_round() -> tuple[int, torch.Tensor, PlanByShard]:
    shape = (LONG.max_rows, LONG.experts_per_token)
    part = ShardPlan(
        rows_U=torch.arange(shape[0]), slots_UK=torch.zeros(shape, dtype=torch.int32), weights_UK=torch.ones(shape)
    )
    return 0, torch.randn(LONG.max_rows, LONG.hidden_size), PlanByShard((part,))


@contextlib.contextmanager
def sending_alone() -> Iterator[None]:
    """Until the threads that were started meanwhile, to send what the system did not take at once, have ended."""
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENT_S)
        assert not thread.is_alive()


# What goes behind what.


@pytest.mark.parametrize("shares", [False, True])
def test_a_call_takes_no_room_of_one_that_nobody_has_answered(shares: bool) -> None:
    """As after a step that has failed, whose replies nobody has received."""
    layout = layout_of()
    worker, shard = form_pair(PATIENT_S, shared_bytes(layout) if shares else 0)
    link, port = Link(worker, layout, EPOCH), LanePort(shard, layout, EPOCH, PATIENT_S)
    sent = [random_rows(3, layout) for _ in range(4)]
    failed, following = (ByShard(LaneExchange([link])) for _ in range(2))
    for layer in range(2):
        failed.send(layer, [sent[layer]])
    calls = [next_call(port) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(following.send, 2, [sent[2]])
        with pytest.raises(TimeoutError):
            third.result(0.3)
        for call, rows in zip(calls, sent, strict=False):
            assert torch.equal(call.rows.x_UH, rows.x_UH)
            port.reply(call, call.rows.x_UH)
        tickets = [third.result(PATIENT_S), following.send(3, [sent[3]])]
        for layer, ticket in enumerate(tickets, start=2):
            call = next_call(port)
            port.reply(call, Scale(0)(call.layer, call.rows))
            assert_answered(following.receive(ticket), [Scale(0)], layer, [sent[layer]])


@pytest.mark.parametrize("num_rows", [2, 600])
@pytest.mark.parametrize("within_host", [True, False])
@pytest.mark.parametrize("gives_way", [True, False])
def test_a_shard_is_told_who_gives_way_if_that_shares_its_cores(
    gives_way: bool, within_host: bool, num_rows: int
) -> None:
    layout = layout_of(max_rows=num_rows)
    worker, shard = form_pair(PATIENT_S)
    worker.within_host = within_host
    link, port = Link(worker, layout, EPOCH), LanePort(shard, layout, EPOCH, PATIENT_S)
    told = []
    # The third finds that the first one's reply is not received yet, and goes another way.
    for layer in range(3):
        exchange = LaneExchange([link])
        exchange.gives_way = gives_way
        ByShard(exchange).send(layer, [random_rows(num_rows, layout)])
        call = next_call(port)
        told.append(call.gives_way)
        port.reply(call, call.rows.x_UH)
    assert told == [gives_way and within_host] * 3


def test_a_heartbeat_goes_behind_a_frame_that_is_not_taken_yet() -> None:
    worker, shard = form_pair(PATIENT_S)
    exchange, port = LaneExchange([Link(worker, LONG, EPOCH)]), LanePort(shard, LONG, EPOCH, PATIENT_S)
    layer, x_TH, plan = long_round()
    ticket = exchange.send(layer, x_TH, plan)
    with ThreadPoolExecutor(1) as pool:
        told = pool.submit(exchange.heartbeat)
        call = next_call(port)
        assert torch.equal(call.rows.x_UH, x_TH)
        told.result(PATIENT_S)
        replied = pool.submit(port.reply, call, call.rows.x_UH)
        y_TH = torch.zeros_like(x_TH)
        served = pool.submit(port.receive)
        exchange.receive(ticket, y_TH)
        replied.result(PATIENT_S)
        assert torch.equal(y_TH, x_TH)
        exchange.close()
        assert served.result(PATIENT_S) is None


@pytest.mark.parametrize("num_rows", [2, 600])
def test_a_shard_that_is_there_is_sent_its_rows_though_another_is_lost(num_rows: int) -> None:
    """Which is said when its reply is to be received."""
    layout = layout_of(max_rows=num_rows)
    (lost, gone), (there, shard) = form_pair(PATIENT_S), form_pair(PATIENT_S)
    exchange, port = (
        LaneExchange([Link(wire, layout, EPOCH) for wire in (lost, there)]),
        LanePort(shard, layout, EPOCH, PATIENT_S),
    )
    gone.abort()
    with within(PATIENT_S), contextlib.suppress(PeerLostError):
        # What is sent first to who is gone is answered by a reset, and fails the next.
        while True:
            exchange.heartbeat()
    rows, by_shard = [random_rows(num_rows, layout) for _ in range(2)], ByShard(exchange)
    ticket = by_shard.send(0, rows)
    assert torch.equal(next_call(port).rows.x_UH, rows[1].x_UH)
    with pytest.raises(LaneError, match="shard 0"):
        by_shard.receive(ticket)


def test_every_shard_that_is_there_hears_a_heartbeat_though_another_is_lost() -> None:
    layout = layout_of()
    (lost, gone), (there, shard) = form_pair(PATIENT_S), form_pair(PATIENT_S)
    exchange = LaneExchange([Link(wire, layout, EPOCH) for wire in (lost, there)])
    gone.abort()
    told = 0

    def tell_until_it_fails() -> None:
        nonlocal told
        while told < 100:
            told += 1
            exchange.heartbeat()

    with pytest.raises(PeerLostError, match="shard 0"):
        tell_until_it_fails()
    shard.receive_into(memoryview(bytearray(told * HEADER_BYTES)), time.monotonic() + PATIENT_S)


# Who gives up when.


def test_a_goodbye_to_a_shard_that_does_not_read_takes_no_longer_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_CLOSE_S", 0.2)
    worker, _shard = form_pair(2 * PATIENT_S)
    exchange = LaneExchange([Link(worker, LONG, EPOCH)])
    exchange.send(*long_round())
    with within(PATIENT_S):
        exchange.close()


def test_behind_a_frame_that_was_not_read_in_time_comes_no_other() -> None:
    worker, shard = form_pair(SHORT_S)
    exchange = LaneExchange([Link(worker, LONG, EPOCH)])
    with sending_alone():
        exchange.send(*long_round())
    # Now there would be room for a short one.
    with contextlib.suppress(BlockingIOError):
        for _ in range(8):
            os.read(shard.fd, 2**20)
    with within(MARGIN_S), pytest.raises(LaneTimeoutError):
        exchange.heartbeat()


def test_a_worker_that_does_not_read_its_reply_is_given_up_at_the_deadline() -> None:
    worker, shard = form_pair(SHORT_S)
    exchange, port = LaneExchange([Link(worker, LONG, EPOCH)]), LanePort(shard, LONG, EPOCH, 2 * PATIENT_S)
    exchange.send(*long_round())
    call = next_call(port)
    port.reply(call, call.rows.x_UH)
    with within(PATIENT_S), pytest.raises(LaneTimeoutError):
        port.receive()


# What is refused.


def test_a_refusal_has_its_text_and_nothing_of_what_was_there_before() -> None:
    layout = layout_of()
    worker, shard = form_pair(PATIENT_S)
    exchange, port = ByShard(LaneExchange([Link(worker, layout, EPOCH)])), LanePort(shard, layout, EPOCH, PATIENT_S)
    room = layout.reply_bytes(1) - HEADER_BYTES
    # Of a long one what fits is told, though it ends within a character.
    for text in ("é" + "x" * room, "x" + "é" * room, "no expert", "", "none") * 2:
        ticket = exchange.send(0, [random_rows(1, layout)])
        port.refuse(next_call(port), ExpertMissingError(text))
        with pytest.raises(ExpertMissingError) as refused:
            exchange.receive(ticket)
        assert str(refused.value) == "shard 0: " + text.encode()[:room].decode(errors="replace")


def test_whoever_is_refused_by_several_shards_hears_all_of_them() -> None:
    layout = layout_of()
    pairs = [form_pair(PATIENT_S) for _ in range(3)]
    exchange = ByShard(LaneExchange([Link(worker, layout, EPOCH) for worker, _ in pairs]))
    ports = [LanePort(shard, layout, EPOCH, PATIENT_S) for _, shard in pairs]
    ticket = exchange.send(0, [random_rows(2, layout) for _ in pairs])
    for number, port in enumerate(ports):
        call = next_call(port)
        if number == 1:
            port.reply(call, call.rows.x_UH)
        else:
            port.refuse(call, ExpertMissingError(f"not at {number}"))
    with pytest.raises(ExpertMissingError, match=r"^shard 0: not at 0; shard 2: not at 2$"):
        exchange.receive(ticket)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"sequence": 1}, "answered frame 1, expected 0"),
        ({"num_rows": 2}, "answered 3 rows with a REPLY of 2 rows"),
        ({"kind": Kind.CALL}, "answered 3 rows with a CALL"),
        ({"kind": Kind.HEARTBEAT}, "answered 3 rows with a HEARTBEAT"),
        ({"kind": Kind.REFUSAL, "shared": True}, "answered 3 rows with a REFUSAL of .* in shared memory"),
    ],
)
def test_what_is_no_reply_to_a_call_is_refused(other: dict[str, Any], error: str, dtype: torch.dtype) -> None:
    layout = layout_of(dtype)
    size = layout.reply_bytes(3) - HEADER_BYTES
    reply = Header(kind=Kind.REPLY, epoch=EPOCH, sequence=0, num_rows=3, payload_bytes=size)
    frame = bytearray(HEADER_BYTES + size)
    reply._replace(**other).write(memoryview(frame))
    y_TH = torch.zeros(3, layout.hidden_size)
    with hearing(bytes(frame), HOST, PATIENT_S) as wire, pytest.raises(LaneError, match=error):
        Link(wire, layout, EPOCH).receive(0, np.arange(3), y_TH)
    assert not y_TH.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reply_that_is_said_to_be_in_memory_that_is_not_shared_is_refused(dtype: torch.dtype) -> None:
    layout, frame = layout_of(dtype), memoryview(bytearray(HEADER_BYTES))
    Header(kind=Kind.REPLY, epoch=EPOCH, num_rows=3, shared=True).write(frame)
    with (
        hearing(bytes(frame), HOST, PATIENT_S) as wire,
        pytest.raises(LaneError, match=r"answered 3 rows with a REPLY .* in shared memory"),
    ):
        Link(wire, layout, EPOCH).receive(0, np.arange(3), torch.zeros(3, layout.hidden_size))
