from __future__ import annotations

import os
import threading
import types
from typing import Any, cast

import pytest

from cluster.workers.engine_loop import EngineLoop
from octet.background import COMPUTING
from octet.config import LaneConfig
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import Abort, KvPull, Message, PrefillRequest, WorkerLoad
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
