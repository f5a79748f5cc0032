"""What the shard's loop does when something fails that nobody foresaw, and what it leaves behind."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch

from experts.loop import DECODE_FIRST, PREFILL_AFTER, ShardLoop
from experts.shard import ExpertShard, Rows
from octet.background import COMPUTING
from octet.errors import PeerLostError
from router.exchange import Call, ExpertRows

PATIENT_S = 20.0


class Lane:
    """Its other end is the test."""

    def __init__(self) -> None:
        self.incoming: queue.Queue[Call | Exception | None] = queue.Queue()
        self.answers: queue.Queue[torch.Tensor | Exception] = queue.Queue()
        self.closed = threading.Event()

    def ask(self, layer: int, room_UH: torch.Tensor | None = None) -> None:
        rows = ExpertRows(x_UH=torch.ones(1, 2), slots_UK=torch.zeros(1, 1).int(), weights_UK=torch.ones(1, 1))
        self.incoming.put(Call(layer=layer, rows=rows, sequence=0, room_UH=room_UH))

    def answer(self) -> torch.Tensor | Exception:
        return self.answers.get(timeout=PATIENT_S)

    def receive(self) -> Call | None:
        item = self.incoming.get()
        if isinstance(item, Exception):
            raise item
        return item

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        self.answers.put(y_UH)

    def refuse(self, call: Call, error: Exception) -> None:
        self.answers.put(error)

    def close(self) -> None:
        self.closed.set()
        self.incoming.put(None)


class Shard:
    """Fails at layer 13, and notes what it is given."""

    def __init__(self) -> None:
        self.rooms: list[torch.Tensor | None] = []
        self.niceness: list[int] = []

    def serve(self, layer: int, rows: Rows, room_UH: torch.Tensor | None = None, pause: Any = None) -> torch.Tensor:
        self.rooms.append(room_UH)
        self.niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        if layer == 13:
            raise RuntimeError("not foreseen")
        return rows.x_UH * layer


@pytest.fixture
def shard() -> Shard:
    return Shard()


@pytest.fixture
def loop(shard: Shard) -> Iterator[ShardLoop]:
    loop = ShardLoop(cast(ExpertShard, shard))
    yield loop
    loop.close(PATIENT_S)


def added(loop: ShardLoop, name: str, lane: Lane, priority: int = DECODE_FIRST) -> threading.Thread:
    """Returns: the thread that serves it."""
    before = set(threading.enumerate())
    loop.add(name, lane, priority)
    (thread,) = (each for each in set(threading.enumerate()) - before if each.name == f"lane-{name}")
    return thread


@pytest.mark.parametrize("priority", [DECODE_FIRST, PREFILL_AFTER])
def test_an_attention_worker_hears_of_a_fault_that_nobody_foresaw_and_its_lane_goes_on(
    loop: ShardLoop, priority: int
) -> None:
    lane = Lane()
    loop.add("lane", lane, priority)
    for _ in range(2):
        lane.ask(13)
        error = lane.answer()
        assert isinstance(error, RuntimeError)
        assert str(error) == "not foreseen"
        lane.ask(4)
        y_UH = lane.answer()
        assert isinstance(y_UH, torch.Tensor)
        assert torch.equal(y_UH, torch.full((1, 2), 4.0))
    assert not lane.closed.is_set()


@pytest.mark.parametrize(
    ("error", "level", "traced"),
    [(PeerLostError("gone"), logging.WARNING, False), (RuntimeError("not foreseen"), logging.ERROR, True)],
)
def test_where_a_lane_failed_is_logged_if_nobody_foresaw_it(
    loop: ShardLoop, caplog: pytest.LogCaptureFixture, error: Exception, level: int, traced: bool
) -> None:
    lane = Lane()
    with caplog.at_level(logging.WARNING, logger="experts.loop"):
        thread = added(loop, "prefill-3", lane)
        lane.incoming.put(error)
        thread.join(PATIENT_S)
    (record,) = caplog.records
    assert (record.levelno, bool(record.exc_info)) == (level, traced)
    assert record.getMessage() == f"lane prefill-3 is given up: {error}"


@pytest.mark.skipif(not hasattr(os, "getpriority"), reason="this system has no niceness")
def test_lanes_compute_behind_those_that_answer_calls(loop: ShardLoop, shard: Shard) -> None:
    before, lane = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), Lane()
    loop.add("decode-0", lane, DECODE_FIRST)
    lane.ask(1)
    lane.answer()
    assert shard.niceness == [min(before + COMPUTING, 19)]


def test_a_shard_is_given_the_room_that_the_answer_is_sent_from(loop: ShardLoop, shard: Shard) -> None:
    room_UH, lane = torch.empty(1, 2), Lane()
    loop.add("decode-0", lane, DECODE_FIRST)
    for room in (room_UH, None):
        lane.ask(1, room)
        lane.answer()
    assert shard.rooms[0] is room_UH
    assert shard.rooms[1] is None


def test_a_lane_that_ends_takes_nothing_from_the_one_in_its_place_and_leaves_nothing_behind(loop: ShardLoop) -> None:
    old, new = Lane(), Lane()
    replaced = added(loop, "decode-0", old)
    serving = added(loop, "decode-0", new)
    replaced.join(PATIENT_S)
    assert not replaced.is_alive()
    assert old.closed.is_set()
    assert not new.closed.is_set()
    assert loop.lanes == ["decode-0"]
    assert list(loop.counters()[1]) == ["decode-0"]
    assert loop._threads == {serving}
    new.ask(3)
    assert isinstance(new.answer(), torch.Tensor)


def test_a_decode_frame_that_came_just_before_a_prefill_frame_goes_on_is_let_pass(loop: ShardLoop) -> None:
    turns, passed = loop._turns, threading.Event()

    def pass_by() -> None:
        turns.take(DECODE_FIRST)
        passed.set()
        turns.give()

    turns.take(PREFILL_AFTER)
    waiting = threading.Thread(target=pass_by)
    waiting.start()
    for _ in range(2000):
        if loop.num_waiting == 1:
            break
        passed.wait(0.01)
    turns.look_out(PREFILL_AFTER, always=False)
    assert turns.due[0] != 0
    turns.step_aside(PREFILL_AFTER)
    assert passed.is_set()
    turns.look_out(PREFILL_AFTER, always=False)
    assert turns.due[0] == 0
    turns.give()
    waiting.join(PATIENT_S)
