from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
import torch

from experts.loop import DECODE_FIRST, PREFILL_AFTER, ShardLoop
from experts.shard import ExpertShard, Rows
from octet.errors import ExpertMissingError, LaneError, PeerLostError
from router.exchange import Call, ExpertRows
from tests.exchange_conformance import LaneSettings, Scale, Wires, assert_answered, random_rows

PATIENT_S = 20.0


class FakeShard:
    """Says what it serves, and waits to be let go on."""

    def __init__(self) -> None:
        self.served: list[int] = []
        self.at_work = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.num_pauses = 0

    def serve(
        self,
        layer: int,
        rows: Rows,
        room_UH: torch.Tensor | None = None,
        pause: Callable[[], object] | None = None,
    ) -> torch.Tensor:
        self.served.append(layer)
        self.at_work.set()
        assert self.may_go_on.wait(PATIENT_S)
        for _ in range(self.num_pauses):
            if pause is not None:
                pause()
            self.served.append(layer)
        if layer < 0:
            raise ExpertMissingError(f"layer {layer} is not here")
        return rows.x_UH * layer


class FakeLane:
    """A lane's end whose other end is the test."""

    def __init__(self, *layers: int) -> None:
        self._incoming: queue.Queue[Call | Exception | None] = queue.Queue()
        self.answers: queue.Queue[tuple[int, torch.Tensor | Exception]] = queue.Queue()
        self.all_received, self.closed = threading.Event(), threading.Event()
        self.broken_for_replies = False
        for layer in layers:
            self.ask(layer)

    def ask(self, layer: int, gives_way: bool = False, num_rows: int = 1) -> None:
        rows = ExpertRows(
            x_UH=torch.ones(num_rows, 2), slots_UK=torch.zeros(num_rows, 1).int(), weights_UK=torch.ones(num_rows, 1)
        )
        self._incoming.put(Call(layer=layer, rows=rows, sequence=0, gives_way=gives_way))

    def end(self, error: Exception | None) -> None:
        self._incoming.put(error)

    def receive(self) -> Call | None:
        if self._incoming.empty():
            self.all_received.set()
        item = self._incoming.get()
        if isinstance(item, Exception):
            raise item
        return item

    def reply(self, call: Call, y_UH: torch.Tensor) -> None:
        if self.broken_for_replies:
            raise PeerLostError("the other end is gone")
        self.answers.put((call.layer, y_UH))

    def refuse(self, call: Call, error: Exception) -> None:
        self.answers.put((call.layer, error))

    def close(self) -> None:
        self.closed.set()
        self._incoming.put(None)


@pytest.fixture
def shard() -> FakeShard:
    return FakeShard()


@pytest.fixture
def loop(shard: FakeShard) -> Iterator[ShardLoop]:
    loop = ShardLoop(cast(ExpertShard, shard))
    yield loop
    shard.may_go_on.set()
    loop.close(PATIENT_S)


def until(happened: Callable[[], bool]) -> None:
    """Wait for a state that nothing announces."""
    tick = threading.Event()
    for _ in range(2000):
        if happened():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


def let_wait(loop: ShardLoop, shard: FakeShard, frames: Mapping[str, Sequence[int]]) -> None:
    """The first lane's first frame is at work until every lane has one that waits; then it may go on."""
    shard.may_go_on.clear()
    for number, (name, layers) in enumerate(frames.items()):
        loop.add(name, FakeLane(*layers), DECODE_FIRST if name.startswith("decode") else PREFILL_AFTER)
        until(lambda number=number: loop.num_waiting == number)  # type: ignore[misc]
        assert shard.at_work.wait(PATIENT_S)
    shard.may_go_on.set()


def test_decode_frames_are_served_before_waiting_prefill_frames(loop: ShardLoop, shard: FakeShard) -> None:
    let_wait(loop, shard, {"prefill-0": (1, 3), "prefill-1": (2,), "decode-0": (11,), "decode-1": (12,)})
    until(lambda: len(shard.served) == 5)
    assert shard.served == [1, 11, 12, 2, 3]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux's SCHED_BATCH is not here")
def test_a_lane_that_wakes_displaces_nobody(loop: ShardLoop, shard: FakeShard) -> None:
    policies: list[int] = []
    served = shard.serve

    def serve(layer: int, rows: Rows, *rest: Any) -> torch.Tensor:
        policies.append(os.sched_getscheduler(0))
        return served(layer, rows, *rest)

    shard.serve = serve  # type: ignore[assignment]
    before, lane = os.sched_getscheduler(0), FakeLane(11)
    loop.add("decode-0", lane, DECODE_FIRST)
    lane.answers.get(timeout=PATIENT_S)
    assert policies == [os.SCHED_BATCH]
    assert os.sched_getscheduler(0) == before


def test_lanes_of_equal_priority_take_turns_in_order_of_arrival(loop: ShardLoop, shard: FakeShard) -> None:
    let_wait(loop, shard, {f"decode-{number}": (number,) for number in range(1, 5)})
    until(lambda: len(shard.served) == 4)
    assert shard.served == [1, 2, 3, 4]


def test_a_prefill_frame_lets_decode_frames_pass_and_goes_on_before_its_equals(
    loop: ShardLoop, shard: FakeShard
) -> None:
    shard.num_pauses = 2
    let_wait(loop, shard, {"prefill-0": (1,), "prefill-1": (2,), "decode-0": (11,), "decode-1": (12,)})
    until(lambda: len(shard.served) == 12)
    assert shard.served == [1, *[11] * 3, *[12] * 3, 1, 1, *[2] * 3]


@pytest.mark.parametrize("gives_way", [False, True])
def test_a_pause_is_due_while_a_decode_frame_waits_and_wherever_a_frame_rests(gives_way: bool) -> None:
    decode, others, prefill = FakeLane(), FakeLane(), FakeLane()
    due: list[bool] = []

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            if layer == 1:
                due.append(pause.due[0] != 0)
                others.ask(2)
                until(lambda: serving.num_waiting == 1)
                due.append(pause.due[0] != 0)
                decode.ask(11)
                until(lambda: serving.num_waiting == 2)
                due.append(pause.due[0] != 0)
                # Were it not for this, a slow machine might take longer than decode frames are remembered.
                serving._decoded_s = time.perf_counter() - 1
                pause()
                serving._decoded_s = time.perf_counter() + 100
                pause()
                due.append(pause.due[0] != 0)
            return rows.x_UH

    serving = ShardLoop(cast(ExpertShard, Shard()))
    serving.add("decode-0", decode, DECODE_FIRST)
    serving.add("prefill-0", prefill, PREFILL_AFTER)
    serving.add("prefill-1", others, PREFILL_AFTER)
    prefill.ask(1, gives_way, 300)
    prefill.answers.get(timeout=PATIENT_S)
    assert due == [False, False, True, gives_way]
    serving.close(PATIENT_S)


def test_nobody_passes_a_decode_frame() -> None:
    """A shard that need not pause computes it in one call."""
    pauses: dict[int, Any] = {}

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            pauses[layer] = pause
            return rows.x_UH

    serving = ShardLoop(cast(ExpertShard, Shard()))
    for name, layer, priority in (("decode-0", 11, DECODE_FIRST), ("prefill-0", 1, PREFILL_AFTER)):
        lane = FakeLane(layer)
        serving.add(name, lane, priority)
        lane.answers.get(timeout=PATIENT_S)
    assert pauses[11] is None
    assert callable(pauses[1])
    serving.close(PATIENT_S)


def test_time_for_which_others_pass_is_waiting_and_not_work() -> None:
    decode, prefill = FakeLane(), FakeLane(1)

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            if layer == 11:
                time.sleep(0.2)
            else:
                decode.ask(11)
                until(lambda: serving.num_waiting == 1)
                pause()
            return super().serve(layer, rows)

    serving = ShardLoop(cast(ExpertShard, Shard()))
    serving.add("decode-0", decode, DECODE_FIRST)
    serving.add("prefill-0", prefill, PREFILL_AFTER)
    prefill.answers.get(timeout=PATIENT_S)
    until(lambda: serving.counters()[0].frames == 2)
    by_lane = serving.counters()[1]
    assert by_lane["prefill-0"].wait_s >= 0.2 > by_lane["prefill-0"].busy_s
    assert by_lane["decode-0"].busy_s >= 0.2
    serving.close(PATIENT_S)


@pytest.mark.parametrize(
    ("gives_way", "decodes", "num_rows"),
    [(True, True, 300), (True, False, 300), (False, True, 300), (True, True, 200)],
    ids=["rests", "nobody_decodes", "does_not_give_way", "short"],
)
def test_a_long_frame_that_gives_way_rests_while_decode_frames_come(
    gives_way: bool, decodes: bool, num_rows: int
) -> None:
    """Sixteen times as long as it has computed."""
    piece_s, decode, prefill = 0.003, FakeLane(), FakeLane()
    waited: list[float] = []

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            if layer == 1:
                time.sleep(piece_s)
                pausing_s = time.perf_counter()
                pause()
                waited.append(time.perf_counter() - pausing_s)
            return rows.x_UH

    serving = ShardLoop(cast(ExpertShard, Shard()))
    serving.add("decode-0", decode, DECODE_FIRST)
    serving.add("prefill-0", prefill, PREFILL_AFTER)
    # Of three, one at least begins within 30 ms of a decode frame, however busy the machine is.
    for _ in range(3):
        if decodes:
            decode.ask(11)
            decode.answers.get(timeout=PATIENT_S)
        prefill.ask(1, gives_way, num_rows)
        prefill.answers.get(timeout=PATIENT_S)
    if gives_way and decodes and num_rows == 300:
        assert max(waited) >= 16 * piece_s
        until(lambda: serving.counters()[0].frames == 6)
        assert serving.counters()[1]["prefill-0"].wait_s >= 0.9 * sum(waited)
    else:
        # What another program may have had of the core in one of them is not a rest.
        assert min(waited) < 16 * piece_s
    serving.close(PATIENT_S)


def test_a_piece_that_took_long_makes_no_long_rest() -> None:
    """A process that is stopped and goes on would rest for minutes otherwise."""
    decode, prefill = FakeLane(), FakeLane()
    rested: list[float] = []

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            if layer == 1:
                time.sleep(0.3)
                # One passes meanwhile.
                decode.ask(11)
                until(lambda: serving.num_waiting == 1)
                pause()
                time.sleep(0.3)
                serving._decoded_s = time.perf_counter()
                pausing_s = time.perf_counter()
                pause()
                rested.append(time.perf_counter() - pausing_s)
            return rows.x_UH

    serving = ShardLoop(cast(ExpertShard, Shard()))
    serving.add("decode-0", decode, DECODE_FIRST)
    serving.add("prefill-0", prefill, PREFILL_AFTER)
    prefill.ask(1, gives_way=True, num_rows=300)
    prefill.answers.get(timeout=PATIENT_S)
    assert 0.05 <= rested[0] < 2.0
    serving.close(PATIENT_S)


def test_decode_frames_are_served_while_a_frame_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    # However late a thread gets a core.
    monkeypatch.setattr("experts.loop._RECENT_S", PATIENT_S)
    monkeypatch.setattr("experts.loop._LONGEST_REST_S", PATIENT_S)
    decode, prefill = FakeLane(), FakeLane()

    class Shard(FakeShard):
        def serve(self, layer: int, rows: Rows, room_UH: Any = None, pause: Any = None) -> torch.Tensor:
            if layer == 1:
                time.sleep(0.02)
                decode.ask(12)
                pause()
            self.served.append(layer)
            return rows.x_UH

    shard = Shard()
    serving = ShardLoop(cast(ExpertShard, shard))
    serving.add("decode-0", decode, DECODE_FIRST)
    serving.add("prefill-0", prefill, PREFILL_AFTER)
    decode.ask(11)
    decode.answers.get(timeout=PATIENT_S)
    prefill.ask(1, gives_way=True, num_rows=300)
    prefill.answers.get(timeout=PATIENT_S)
    assert shard.served == [11, 12, 1]
    serving.close(PATIENT_S)


def test_an_answer_goes_back_on_the_lane_that_asked(loop: ShardLoop) -> None:
    lanes = {name: FakeLane(layer) for layer, name in enumerate(["prefill-0", "decode-0", "decode-1"], start=5)}
    for name, lane in lanes.items():
        loop.add(name, lane, DECODE_FIRST)
    assert [lane.answers.get(timeout=PATIENT_S)[0] for lane in lanes.values()] == [5, 6, 7]


def test_a_failing_call_is_refused_with_its_error(loop: ShardLoop) -> None:
    lane = FakeLane(-1)
    loop.add("decode-0", lane, DECODE_FIRST)
    _, error = lane.answers.get(timeout=PATIENT_S)
    assert isinstance(error, ExpertMissingError)


def test_the_loop_goes_on_after_a_failing_call(loop: ShardLoop) -> None:
    lane = FakeLane(-1, 4)
    loop.add("decode-0", lane, DECODE_FIRST)
    lane.answers.get(timeout=PATIENT_S)
    layer, y_UH = lane.answers.get(timeout=PATIENT_S)
    assert layer == 4
    assert isinstance(y_UH, torch.Tensor)


@pytest.mark.parametrize("error", [PeerLostError("gone"), None, RuntimeError("not foreseen")], ids=repr)
def test_a_lane_that_ends_is_closed_and_retired(loop: ShardLoop, error: Exception | None) -> None:
    lane = FakeLane()
    loop.add("decode-0", lane, DECODE_FIRST)
    lane.end(error)
    assert lane.closed.wait(PATIENT_S)
    until(lambda: loop.lanes == [])


def test_other_lanes_are_served_after_one_breaks(loop: ShardLoop) -> None:
    broken, whole = FakeLane(), FakeLane()
    loop.add("decode-0", broken, DECODE_FIRST)
    loop.add("decode-1", whole, DECODE_FIRST)
    broken.end(LaneError("broken"))
    until(lambda: loop.lanes == ["decode-1"])
    whole.ask(9)
    assert whole.answers.get(timeout=PATIENT_S)[0] == 9


def test_a_reply_to_a_broken_lane_does_not_end_the_loop(loop: ShardLoop) -> None:
    broken, whole = FakeLane(), FakeLane()
    broken.broken_for_replies = True
    loop.add("decode-0", broken, DECODE_FIRST)
    broken.ask(8)
    loop.add("decode-1", whole, DECODE_FIRST)
    whole.ask(9)
    assert whole.answers.get(timeout=PATIENT_S)[0] == 9


def test_a_lane_that_broke_is_logged_with_its_reason(loop: ShardLoop, caplog: pytest.LogCaptureFixture) -> None:
    lane = FakeLane()
    with caplog.at_level(logging.WARNING, logger="experts.loop"):
        loop.add("prefill-3", lane, PREFILL_AFTER)
        lane.end(PeerLostError("its process is gone"))
        until(lambda: loop.lanes == [])
    assert "prefill-3" in caplog.text
    assert "its process is gone" in caplog.text


def test_frames_are_counted_in_total_and_by_lane(loop: ShardLoop) -> None:
    lanes = {"prefill-0": FakeLane(1, 2), "decode-0": FakeLane(3)}
    for name, lane in lanes.items():
        loop.add(name, lane, DECODE_FIRST)
    until(lambda: loop.counters()[0].frames == 3)
    until(lambda: {name: lane.frames for name, lane in loop.counters()[1].items()} == {"prefill-0": 2, "decode-0": 1})
    total, _ = loop.counters()
    assert total.rows == 3
    assert total.busy_s > 0


def test_time_at_work_and_time_in_the_queue_are_counted_apart(loop: ShardLoop, shard: FakeShard) -> None:
    shard.may_go_on.clear()
    loop.add("decode-0", FakeLane(1), DECODE_FIRST)
    assert shard.at_work.wait(PATIENT_S)
    loop.add("prefill-0", FakeLane(2), PREFILL_AFTER)
    until(lambda: loop.num_waiting == 1)
    threading.Event().wait(0.2)
    shard.may_go_on.set()
    until(lambda: loop.counters()[0].frames == 2)
    _, lanes = loop.counters()
    assert lanes["decode-0"].busy_s >= 0.2 > lanes["decode-0"].wait_s
    assert lanes["prefill-0"].wait_s >= 0.2 > lanes["prefill-0"].busy_s


def test_a_closed_lane_stays_in_the_total_only(loop: ShardLoop) -> None:
    lane = FakeLane(1)
    loop.add("decode-0", lane, DECODE_FIRST)
    until(lambda: loop.counters()[0].frames == 1)
    lane.end(None)
    until(lambda: loop.lanes == [])
    until(lambda: loop.counters()[1] == {})
    assert loop.counters()[0].frames == 1


def test_a_lane_formed_anew_takes_the_place_of_the_old_one(loop: ShardLoop) -> None:
    old, new = FakeLane(), FakeLane()
    loop.add("decode-0", old, DECODE_FIRST)
    loop.add("decode-0", new, DECODE_FIRST)
    assert old.closed.wait(PATIENT_S)
    new.ask(3)
    assert new.answers.get(timeout=PATIENT_S)[0] == 3
    assert loop.lanes == ["decode-0"]


def test_closing_closes_every_lane(shard: FakeShard) -> None:
    loop = ShardLoop(cast(ExpertShard, shard))
    lanes = [FakeLane(), FakeLane()]
    for number, lane in enumerate(lanes):
        loop.add(f"decode-{number}", lane, DECODE_FIRST)
    loop.close(PATIENT_S)
    assert all(lane.closed.is_set() for lane in lanes)
    assert loop.lanes == []


def test_it_serves_real_lanes_of_several_attention_workers() -> None:
    class Scaling:
        def serve(self, layer: int, rows: Any, *_: Any) -> torch.Tensor:
            return Scale(0)(layer, rows)

    loop = ShardLoop(cast(ExpertShard, Scaling()))
    settings = LaneSettings(num_shards=1)
    with Wires().open(settings) as prefill, Wires().open(settings) as decode:
        loop.add("prefill-0", prefill.ports[0], PREFILL_AFTER)
        loop.add("decode-0", decode.ports[0], DECODE_FIRST)
        for layer in range(4):
            for lane in (prefill, decode):
                sent = [random_rows(3 + layer, settings.layout)]
                assert_answered(lane.exchange.receive(lane.exchange.send(layer, sent)), [Scale(0)], layer, sent)
        prefill.exchange.close()
        until(lambda: loop.lanes == ["decode-0"])
        loop.close(PATIENT_S)
