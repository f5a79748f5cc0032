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
from multiprocessing.process import BaseProcess

import pytest
import torch

from octet.errors import LaneError, LaneTimeoutError, PeerLostError, WrongEpochError
from octet.ids import Epoch
from router.frames import FrameLayout, Header, Kind
from router.group import Group, GroupStore
from router.lane import LaneExchange, Link
from tests.exchange_conformance import (
    CONNECT_S,
    EPOCH,
    HOST,
    MARGIN_S,
    PATIENT_S,
    ExchangeConformance,
    Gloo,
    Local,
    Scale,
    assert_answered,
    form_pair,
    layout_of,
    random_rows,
    serve_in_process,
    within,
)


class TestLocalExchange(ExchangeConformance):
    implementation = Local()


class TestGlooLane(ExchangeConformance):
    implementation = Gloo()


def test_a_reply_of_another_epoch_is_recognised() -> None:
    layout = layout_of()
    ends = form_pair(PATIENT_S)
    exchange = LaneExchange([Link(ends[0], layout, EPOCH)])
    ticket = exchange.send(0, [random_rows(1, layout)])
    ends[1].receive(layout.new_buffer(), 0).wait()
    reply = layout.new_buffer()[: layout.reply_bytes(1)]
    Header(kind=Kind.REPLY, epoch=Epoch(EPOCH - 1), num_rows=1).write(reply)
    answered = ends[1].send(reply, 0)
    with pytest.raises(WrongEpochError, match=f"epoch {EPOCH - 1} .* epoch {EPOCH}"):
        exchange.receive(ticket)
    answered.wait()
    for end in ends:
        end.abort()


@contextlib.contextmanager
def lane_to_a_process(layout: FrameLayout, reply_s: float) -> Iterator[tuple[LaneExchange, BaseProcess]]:
    """An exchange with one shard, in a process of its own that has answered once."""
    store = GroupStore.host(HOST, CONNECT_S)
    process = multiprocessing.get_context("spawn").Process(
        target=serve_in_process, args=(store.address, "lane", layout), daemon=True
    )
    process.start()
    try:
        group = Group(store, "lane", 0, 2, HOST, CONNECT_S, reply_s)
        exchange = LaneExchange([Link(group, layout, EPOCH)])
        sent = [random_rows(2, layout)]
        assert_answered(exchange.receive(exchange.send(0, sent)), [Scale(0)], 0, sent)
        yield exchange, process
        group.abort()
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
    layout, reply_s = layout_of(torch.bfloat16), 2.0
    with lane_to_a_process(layout, reply_s) as (exchange, process):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        ticket = exchange.send(1, [random_rows(2, layout)])
        start_s = time.monotonic()
        with within(reply_s + MARGIN_S), pytest.raises(LaneTimeoutError):
            exchange.receive(ticket)
        assert time.monotonic() - start_s > 0.9 * reply_s


def broken_call(exchange: LaneExchange, call: str) -> None:
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
    exchange, held = LaneExchange([link]), weakref.ref(link)
    shard.abort()
    gc.disable()
    try:
        broken_call(exchange, call)
        del link, exchange
        assert held() is None, "its port stays open"
    finally:
        gc.enable()
