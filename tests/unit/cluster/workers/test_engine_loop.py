from __future__ import annotations

import os
import threading
import time
import types
from typing import Any, cast

import pytest

from cluster.workers.engine_loop import EngineLoop
from octet.background import COMPUTING
from octet.config import LaneConfig
from octet.errors import LaneTimeoutError, PeerLostError, UnavailableError, WireError
from octet.ids import Epoch, LeaseId, RequestId, WorkerId
from octet.messages import Abort, Failed, KvPull, Message, PrefillRequest, StepReport, WorkerLoad
from octet.request import Output, Sampling, Stopping

PATIENT_S = 20.0
PULL = KvPull(lease_id=LeaseId("a"), decode_worker=WorkerId("decode-0"), channel=0)
REQUEST = PrefillRequest(
    request_id=RequestId("r"),
    attempt=0,
    choices=(0,),
    token_ids=b"",
    num_prompt_tokens=0,
    sampling=Sampling(),
    stopping=Stopping(max_new_tokens=1),
    output=Output(),
    priority=0,
    arrival_s=0.0,
    decode_worker=WorkerId("decode-0"),
    frontend=WorkerId("frontend-0"),
)
ABORT = Abort(request_id=RequestId("r"), choice=None, attempt=0)


def own() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


class Played:
    """Mailbox, engine and exchange of a loop: an engine whose one step hears what came meanwhile, twice."""

    def __init__(
        self,
        niceness: int = 0,
        gives_way: bool = False,
        coming: list[list[Message]] | None = None,
        gather_s: float = 0.0,
        gathers: bool = True,
    ) -> None:
        self.gives_way, self.niceness, self.gathers = gives_way, -1, gathers
        self.coming: list[list[Message]] = [[], [ABORT], [PULL, ABORT]] if coming is None else coming
        self.handled: list[str] = []
        self.begun_with = 0
        self.busy, self.done = True, threading.Event()
        mine = cast(Any, self)
        self.loop = EngineLoop(WorkerId("prefill-0"), mine, mine, mine, LaneConfig(), print, niceness, gather_s)

    def receive(self, timeout_s: float) -> list[Message]:
        return self.coming.pop(0) if self.coming else []

    def handle(self, message: Message) -> None:
        self.handled.append(type(message).__name__)
        self.busy = self.busy or (message is REQUEST and "step" not in self.handled)
        if self.handled.count("Abort") == 2:
            self.done.set()

    def step(self, now_s: float) -> list[Any]:
        if self.busy:
            self.begun_with = len(self.handled)
            self.loop.hear()
            self.loop.hear()
            self.handled.append("step")
            self.niceness = own()
            self.busy = False
        return []

    def load(self) -> WorkerLoad:
        return WorkerLoad(kv_pages_total=1, kv_pages_free=1, running=1, waiting=0, tokens=0)

    def adopt(self, planner: Any, exchange: Any) -> None:
        return

    def wake(self) -> None:
        return


def test_pulls_are_answered_within_a_step_and_all_else_behind_it_in_order() -> None:
    played = Played()
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert played.handled == ["KvPull", "step", "Abort", "Abort"]


def test_requests_are_known_within_a_step_unless_something_was_said_before_them() -> None:
    played = Played(coming=[[], [REQUEST], [ABORT, REQUEST, PULL], [ABORT]])
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert played.handled == ["PrefillRequest", "KvPull", "step", "Abort", "PrefillRequest", "Abort"]


@pytest.mark.parametrize(("gather_s", "gathers", "first"), [(0.5, True, 3), (0.5, False, 1), (0.0, True, 1)])
def test_the_first_of_a_burst_waits_for_the_others(gather_s: float, gathers: bool, first: int) -> None:
    # A pause of the burst is its end.
    coming: list[list[Message]] = [[REQUEST], [REQUEST, REQUEST], [], [ABORT], [ABORT]]
    played = Played(coming=coming, gather_s=gather_s, gathers=gathers)
    played.busy = False
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert played.begun_with == first


@pytest.mark.parametrize(("gives_way", "back"), [(True, 3), (False, 0)])
def test_a_step_that_gives_way_is_stepped_back(gives_way: bool, back: int) -> None:
    before, played = own(), Played(niceness=3, gives_way=gives_way)
    exchange = types.SimpleNamespace(gives_way=None, heartbeat=lambda: None)
    played.loop.start(cast(Any, None), cast(Any, exchange))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert played.niceness == min(before + COMPUTING + back, 19)
    assert exchange.gives_way == gives_way


LOAD = WorkerLoad(kv_pages_total=0, kv_pages_free=0, running=0, waiting=0, tokens=0)
FAILED = StepReport(
    worker_id=WorkerId("decode-0"),
    epoch=Epoch(1),
    events=(Failed(request_id=RequestId("r"), choice=0, attempt=0, reason="", retryable=True),),
    load=LOAD,
)


class Lane:
    """To shards that are there, or that are gone."""

    def __init__(self, *, broken: bool) -> None:
        self.broken, self.gives_way, self.num_heartbeats = broken, False, 0
        self.alive = threading.Event()

    def heartbeat(self) -> None:
        self.num_heartbeats += 1
        if self.num_heartbeats == 3:
            self.alive.set()
        if self.broken:
            raise PeerLostError("experts-1 is gone as well")


class Stranded:
    """Mailbox, engine and model of a decode worker whose first step fails, with its lane or otherwise."""

    def __init__(self, lane: LaneConfig, error: Exception | None = None, *, only_when_woken: bool = False) -> None:
        self.busy, self.gives_way, self.gathers = True, False, False
        self.lane: Lane | None = None
        self.stepped_over: list[Lane | None] = []
        self.failures: list[tuple[str, bool]] = []
        self.reports: list[str] = []
        self.sent: list[tuple[WorkerId, Message]] = []
        self.coming: list[Message] = []
        self.handled: list[Message] = []
        self.drops = types.SimpleNamespace(noted=[])
        self.drops.note = self.drops.noted.append
        self.reported, self.stepped, self.refused = threading.Event(), threading.Event(), threading.Event()
        self._error, self._woken, self._only_when_woken = error, threading.Event(), only_when_woken
        mine = cast(Any, self)
        self.loop = EngineLoop(WorkerId("decode-0"), mine, mine, mine, lane, self._report)

    def _report(self, reason: str) -> None:
        self.reports.append(reason)
        self.reported.set()

    def receive(self, timeout_s: float) -> list[Message]:
        if timeout_s and self._only_when_woken:
            self._woken.wait(PATIENT_S)
            self._woken.clear()
        messages, self.coming = self.coming, []
        return messages

    def wake(self) -> None:
        self._woken.set()

    def send(self, to: WorkerId, message: Message) -> None:
        self.sent.append((to, message))
        self.refused.set()

    def handle(self, message: Message) -> None:
        self.handled.append(message)
        if message is ABORT:
            raise WireError("of a request that nobody has")

    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]:
        self.stepped_over.append(self.lane)
        if self._error is not None:
            raise self._error
        if self.lane is not None and self.lane.broken:
            raise PeerLostError("experts-0 is gone")
        self.busy = False
        self.stepped.set()
        return []

    def fail_all(self, reason: str, retryable: bool = False) -> None:
        self.failures.append((reason, retryable))

    def flush(self) -> list[tuple[WorkerId, Message]]:
        return [(WorkerId("frontend-0"), FAILED)] if self.failures else []

    def adopt(self, planner: Any, exchange: Any) -> None:
        self.lane = exchange


def test_a_step_that_fails_with_its_lane_is_done_again_over_the_next_one() -> None:
    worker = Stranded(LaneConfig(timeout_s=PATIENT_S / 2), only_when_woken=True)
    broken, whole = Lane(broken=True), Lane(broken=False)
    worker.loop.start(cast(Any, None), cast(Any, broken))
    assert worker.reported.wait(PATIENT_S)
    assert (worker.loop.state, worker.reports) == ("WAITING", ["PeerLostError: experts-0 is gone"])
    worker.loop.adopt(cast(Any, None), cast(Any, whole))
    assert worker.stepped.wait(PATIENT_S)
    worker.loop.stop(PATIENT_S)
    assert worker.stepped_over[:2] == [broken, whole]
    assert (worker.loop.state, worker.loop.reason, len(worker.reports)) == ("READY", "", 1)
    assert worker.failures == [], "nobody has to ask again"


def test_shards_that_are_left_hear_of_a_worker_that_waits_for_another_lane() -> None:
    worker, broken = Stranded(LaneConfig(heartbeat_s=0.001)), Lane(broken=True)
    worker.loop.start(cast(Any, None), cast(Any, broken))
    assert broken.alive.wait(PATIENT_S)
    assert worker.loop.state == "WAITING"
    worker.loop.stop(PATIENT_S)


def test_what_waits_too_long_for_another_lane_fails_and_may_be_tried_elsewhere() -> None:
    worker = Stranded(LaneConfig(recovery_s=0.01))
    worker.loop.start(cast(Any, None), cast(Any, Lane(broken=True)))
    assert worker.refused.wait(PATIENT_S)
    worker.loop.stop(PATIENT_S)
    reason, retryable = worker.failures[0]
    assert "experts-0 is gone" in reason
    assert retryable
    assert worker.sent[0] == (WorkerId("frontend-0"), FAILED)


def test_a_worker_that_has_failed_refuses_what_still_comes() -> None:
    worker = Stranded(LaneConfig(), ZeroDivisionError("a mistake of ours"))
    worker.loop.start(cast(Any, None), cast(Any, Lane(broken=False)))
    assert worker.refused.wait(PATIENT_S)
    assert (worker.loop.state, worker.loop.reason) == ("FAILED", "ZeroDivisionError: a mistake of ours")
    worker.refused.clear()
    worker.coming = [REQUEST]
    assert worker.refused.wait(PATIENT_S), "it answers for as long as it is there"
    worker.loop.stop(PATIENT_S)
    assert all(retryable for _, retryable in worker.failures)
    assert worker.reports == [], "its lane is whole"


def test_a_message_that_makes_no_sense_is_dropped_and_counted() -> None:
    worker = Stranded(LaneConfig())
    worker.coming = [ABORT, PULL]
    worker.loop.start(cast(Any, None), cast(Any, Lane(broken=False)))
    assert worker.stepped.wait(PATIENT_S)
    worker.loop.stop(PATIENT_S)
    assert worker.handled == [ABORT, PULL]
    assert [str(error) for error in worker.drops.noted] == ["of a request that nobody has"]


def test_an_idle_lane_carries_a_heartbeat_now_and_then_and_one_with_steps_none() -> None:
    lane = Lane(broken=False)
    worker = Stranded(LaneConfig(heartbeat_s=5.0))
    worker.loop._take(types.SimpleNamespace(planner=None, exchange=lane, taken=threading.Event()))  # type: ignore[arg-type]
    now_s = time.monotonic()
    for turn in range(200):
        worker.loop._keep_lane(now_s + 0.1 * turn, silent=turn >= 60)
    # The last step is 5.9 s from the first turn, and the last turn 19.9 s.
    assert lane.num_heartbeats == 2


class Endless(Played):
    """A burst that goes on for as long as somebody listens."""

    def receive(self, timeout_s: float) -> list[Message]:
        return [REQUEST]

    def step(self, now_s: float) -> list[Any]:
        self.done.set()
        return []


def test_a_burst_without_an_end_keeps_its_first_waiting_for_a_while_only() -> None:
    played = Endless(gather_s=0.001)
    played.busy = False
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)


class Timed(Played):
    """Notes for how long the loop is ready to wait for a message."""

    def __init__(self, coming: list[list[Message]]) -> None:
        super().__init__(coming=coming)
        self.waits: list[tuple[bool, float]] = []

    def receive(self, timeout_s: float) -> list[Message]:
        self.waits.append((self.busy, timeout_s))
        if len(self.waits) > 10:
            self.done.set()
        return super().receive(timeout_s)


def test_an_engine_with_work_waits_for_no_message_and_an_idle_one_does() -> None:
    played = Timed([])
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert {timeout_s for busy, timeout_s in played.waits if busy} == {0.0}
    assert {timeout_s > 0 for busy, timeout_s in played.waits if not busy} == {True}


def test_what_a_step_has_left_is_dealt_with_before_anything_is_waited_for() -> None:
    # It comes within the step, as the second and the third call do.
    played = Timed([[], [ABORT]])
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert [timeout_s > 0 for _, timeout_s in played.waits[:5]] == [False, False, False, False, True]
    assert played.handled == ["step", "Abort"]


def test_steps_that_computed_something_are_counted_with_their_time() -> None:
    played = Played()
    played.loop.start(cast(Any, None), cast(Any, played))
    assert played.done.wait(PATIENT_S)
    played.loop.stop(PATIENT_S)
    assert played.loop.num_steps == 1
    assert played.loop.step_s > 0


def test_a_lane_that_is_not_taken_in_time_is_an_error() -> None:
    worker = Stranded(LaneConfig(timeout_s=0.01))
    with pytest.raises(LaneTimeoutError, match=r"decode-0 did not end its step within 0\.01 s"):
        worker.loop.adopt(cast(Any, None), cast(Any, Lane(broken=False)))


class Waited(Stranded):
    """Notes how long the loop is ready to wait for a message once its lane has broken."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        super().__init__(LaneConfig())

    def receive(self, timeout_s: float) -> list[Message]:
        if self.loop.state == "WAITING":
            self.waits.append(timeout_s)
            self.refused.set()
        return super().receive(timeout_s)


def test_a_worker_without_a_lane_sleeps_though_it_has_work() -> None:
    worker = Waited()
    worker.loop.start(cast(Any, None), cast(Any, Lane(broken=True)))
    assert worker.refused.wait(PATIENT_S)
    worker.loop.stop(PATIENT_S)
    assert worker.busy
    assert min(worker.waits) > 0


class Parted(Stranded):
    """Its step has something to tell two frontends, of which the first is gone."""

    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]:
        super().step(now_s)
        return [(WorkerId(f"frontend-{number}"), FAILED) for number in range(2)]

    def send(self, to: WorkerId, message: Message) -> None:
        if to == "frontend-0":
            raise UnavailableError("no such peer: frontend-0")
        super().send(to, message)


def test_a_peer_that_is_gone_keeps_nothing_from_the_others() -> None:
    worker = Parted(LaneConfig())
    worker.loop.start(cast(Any, None), cast(Any, Lane(broken=False)))
    assert worker.refused.wait(PATIENT_S)
    worker.loop.stop(PATIENT_S)
    assert worker.sent[0] == (WorkerId("frontend-1"), FAILED)
    assert worker.loop.state == "READY"
