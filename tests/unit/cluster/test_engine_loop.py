from __future__ import annotations

import threading
from typing import Any, cast

from cluster.engine_loop import EngineLoop
from octet.config import LaneConfig
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import Abort, KvPull, Message

PATIENT_S = 20.0
PULL = KvPull(lease_id=LeaseId("a"), decode_worker=WorkerId("decode-0"), channel=0)
ABORT = Abort(request_id=RequestId("r"), choice=None, attempt=0)


class Played:
    """Mailbox, engine and exchange of a loop: an engine whose one step hears what came meanwhile, twice."""

    def __init__(self) -> None:
        self.coming: list[list[Message]] = [[], [ABORT], [PULL, ABORT]]
        self.handled: list[str] = []
        self.busy, self.done = True, threading.Event()
        self.loop = EngineLoop(
            WorkerId("prefill-0"), cast(Any, self), cast(Any, self), cast(Any, self), LaneConfig(), print, niceness=0
        )

    def receive(self, timeout_s: float) -> list[Message]:
        return self.coming.pop(0) if self.coming else []

    def handle(self, message: Message) -> None:
        self.handled.append(type(message).__name__)
        if self.handled.count("Abort") == 2:
            self.done.set()

    def step(self, now_s: float) -> list[Any]:
        if self.busy:
            self.loop.hear()
            self.loop.hear()
            self.handled.append("step")
            self.busy = False
        return []

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
