"""Exchanges that need no GPU, held to the contract, and what only real processes can show."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess

import pytest
import torch

from octet.errors import LaneError, LaneTimeoutError, PeerLostError, WrongEpochError
from octet.ids import Epoch
from router import lane
from router.frames import FrameLayout
from router.group_store import GroupStore
from router.lane import WORKER, LaneExchange, LanePort
from router.link import Link
from router.wire import Wire
from tests.exchange_conformance import (
    CONNECT_S,
    EPOCH,
    HOST,
    MARGIN_S,
    PATIENT_S,
    SECRET,
    ByShard,
    ExchangeConformance,
    Local,
    Scale,
    Wires,
    assert_answered,
    form_pair,
    layout_of,
    next_call,
    random_rows,
    serve_in_process,
    serve_until_closed,
    within,
)


class TestLocalExchange(ExchangeConformance):
    implementation = Local()


class TestWireLane(ExchangeConformance):
    implementation = Wires()


class TestSharedMemoryLane(ExchangeConformance):
    implementation = Wires(shares=True)


def test_a_reply_of_another_epoch_is_recognised() -> None:
    layout = layout_of()
    ends = form_pair(PATIENT_S)
    exchange = ByShard(LaneExchange([Link(ends[0], layout, EPOCH)]))
    ticket = exchange.send(0, [random_rows(1, layout)])
    call = next_call(LanePort(ends[1], layout, EPOCH, PATIENT_S))
    LanePort(ends[1], layout, Epoch(EPOCH - 1), PATIENT_S).reply(call, call.rows.x_UH)
    with pytest.raises(WrongEpochError, match=f"epoch {EPOCH - 1} .* epoch {EPOCH}"):
        exchange.receive(ticket)


@pytest.mark.parametrize("under_way", [1, 2])
@pytest.mark.parametrize("before", [0, 1])
def test_the_link_to_a_shard_that_stays_is_used_again_after_a_step_that_lost_another(
    before: int, under_way: int
) -> None:
    layout = layout_of()
    pairs = [form_pair(PATIENT_S) for _ in range(3)]
    lost, kept, new = (
        (Link(worker, layout, EPOCH), LanePort(shard, layout, EPOCH, PATIENT_S)) for worker, shard in pairs
    )
    failing = ByShard(LaneExchange([lost[0], kept[0]]))
    for layer in range(before):
        sent = [None, random_rows(3, layout)]
        ticket = failing.send(layer, sent)
        call = next_call(kept[1])
        kept[1].reply(call, Scale(1)(call.layer, call.rows))
        assert_answered(failing.receive(ticket), [Scale(0), Scale(1)], layer, sent)
    tickets = [failing.send(layer, [random_rows(1, layout), random_rows(9, layout)]) for layer in range(under_way)]
    late = [next_call(kept[1]) for _ in range(under_way)]
    lost[1].close()
    for ticket in tickets:
        with within(MARGIN_S), pytest.raises(LaneError, match="shard 0"):
            failing.receive(ticket)
    with pytest.raises(LaneError, match="shard 0"):
        failing.heartbeat()

    following = ByShard(LaneExchange([kept[0], new[0]]))
    with ThreadPoolExecutor(2) as pool:
        for call in late:
            kept[1].reply(call, Scale(0)(call.layer, call.rows))
        served = [pool.submit(serve_until_closed, port, Scale(shard)) for shard, (_, port) in enumerate((kept, new))]
        for layer in range(5):
            sent = [random_rows(2 + layer, layout), random_rows(1, layout)]
            with within(MARGIN_S):
                assert_answered(following.receive(following.send(layer, sent)), [Scale(0), Scale(1)], layer, sent)
        following.close()
        for future in served:
            future.result(PATIENT_S)


def test_the_first_that_is_done_is_awaited_but_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = layout_of()
    pairs = [form_pair(PATIENT_S) for _ in range(2)]
    exchange = LaneExchange([Link(worker, layout, EPOCH) for worker, _ in pairs])
    ports = [LanePort(shard, layout, EPOCH, PATIENT_S) for _, shard in pairs]
    asked, sent = ByShard(exchange), [random_rows(2, layout) for _ in range(2)]
    ticket = asked.send(0, sent)
    with within(MARGIN_S):
        exchange.await_first(ticket.ticket)
    calls = [next_call(port) for port in ports]
    monkeypatch.setattr(lane, "_FIRST_MS", 60_000)

    def answer(shard: int) -> float:
        time.sleep(0.2)
        done_s = time.monotonic()
        ports[shard].reply(calls[shard], Scale(shard)(calls[shard].layer, calls[shard].rows))
        return done_s

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(answer, 1)
        exchange.await_first(ticket.ticket)
        assert time.monotonic() >= first.result()
        answer(0)
    assert_answered(asked.receive(ticket), [Scale(0), Scale(1)], 0, sent)
    pairs[0][1].abort()
    with within(MARGIN_S):
        exchange.await_first(asked.send(1, sent).ticket)


@contextlib.contextmanager
def lane_to_a_process(layout: FrameLayout, reply_s: float) -> Iterator[tuple[ByShard, BaseProcess]]:
    """An exchange with one shard, in a process of its own that has answered once."""
    store = GroupStore.host(HOST, CONNECT_S, SECRET)
    process = multiprocessing.get_context("spawn").Process(
        target=serve_in_process, args=(store.address, "lane", layout), daemon=True
    )
    process.start()
    try:
        wire = Wire.join(store, "lane", WORKER, HOST, CONNECT_S, reply_s)
        exchange = ByShard(LaneExchange([Link(wire, layout, EPOCH)]))
        sent = [random_rows(2, layout)]
        assert_answered(exchange.receive(exchange.send(0, sent)), [Scale(0)], 0, sent)
        yield exchange, process
        wire.abort()
    finally:
        process.kill()
        process.join(PATIENT_S)
        process.close()


def test_a_shard_process_that_is_killed_is_noticed_at_once() -> None:
    layout = layout_of()
    with lane_to_a_process(layout, PATIENT_S) as (exchange, process):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with within(MARGIN_S), pytest.raises(PeerLostError):
            exchange.receive(exchange.send(1, [random_rows(2, layout)]))


def test_a_shard_process_that_is_stopped_is_given_up_at_the_deadline() -> None:
    # Its first answer takes as long as the loading of what is compiled.
    layout, reply_s = layout_of(torch.bfloat16), 5.0
    with lane_to_a_process(layout, reply_s) as (exchange, process):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        ticket = exchange.send(1, [random_rows(2, layout)])
        start_s = time.monotonic()
        with within(reply_s + MARGIN_S), pytest.raises(LaneTimeoutError):
            exchange.receive(ticket)
        assert time.monotonic() - start_s > 0.9 * reply_s


def broken_call(exchange: ByShard, call: str) -> None:
    """Until it fails, as it does when the other end has gone."""
    with contextlib.suppress(LaneError):
        for _ in range(100):
            if call == "heartbeat":
                exchange.heartbeat()
            else:
                exchange.receive(exchange.send(0, [random_rows(3, layout_of())]))
        pytest.fail("a link whose other end has gone still works")


@pytest.mark.parametrize("call", ["heartbeat", "step"])
def test_a_broken_lane_is_gone_with_its_last_owner_and_waits_for_no_garbage_collection(call: str) -> None:
    worker, shard = form_pair(PATIENT_S)
    link = Link(worker, layout_of(), EPOCH)
    exchange, held = ByShard(LaneExchange([link])), weakref.ref(link)
    shard.abort()
    gc.disable()
    try:
        broken_call(exchange, call)
        del link, exchange
        assert held() is None, "its port stays open"
    finally:
        gc.enable()
