"""The thread that drives an attention worker's engine: receive, step, send; and what it does when its lane breaks."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from octet.background import COMPUTING, step_back
from octet.config import LaneConfig
from octet.errors import LaneError, LaneTimeoutError, UnavailableError, WireError
from octet.faults import reach
from octet.ids import WorkerId
from octet.mailbox import Mailbox
from octet.messages import KvPull, Message, PrefillRequest, WorkerLoad
from router.exchange import Exchange
from router.plan import Planner
from router.routed_experts import RoutedExperts

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.2
"""How long an idle loop sleeps at most; a message wakes it at once."""
_LONGEST_BURST = 20
"""Times `gather_s` that the first of a burst waits at most."""


class Engine(Protocol):
    """What the loop drives: `PrefillEngine` or `DecodeEngine`."""

    @property
    def busy(self) -> bool: ...
    @property
    def gives_way(self) -> bool: ...
    @property
    def gathers(self) -> bool: ...
    def handle(self, message: Message) -> None: ...
    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]: ...
    def fail_all(self, reason: str, retryable: bool = False) -> None: ...
    def flush(self) -> list[tuple[WorkerId, Message]]: ...
    def load(self) -> WorkerLoad: ...


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Adoption:
    planner: Planner
    exchange: Exchange
    taken: threading.Event


class EngineLoop:
    """States: CONNECTING, READY, WAITING while the lane is broken, FAILED.

    A step that fails with its lane has changed nothing: what runs here waits, and the step is done again over the lane
    that is adopted next. Only when none comes within `lane.recovery_s`, everything here fails.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        engine: Engine,
        routed: RoutedExperts,
        mailbox: Mailbox,
        config: LaneConfig,
        report: Callable[[str], None],
        niceness: int = 0,
        gather_s: float = 0.0,
    ) -> None:
        """
        Args:
            report: told once when the lane has broken, and why; returns at once.
            niceness: beyond the process's own, of the threads that compute while the engine gives way.
            gather_s: how soon one message follows another of the same burst, for which an idle engine that gathers
                waits.
        """
        self._worker_id, self._engine, self._routed, self._mailbox = worker_id, engine, routed, mailbox
        self._config, self._report, self._gather_s = config, report, gather_s
        self._behind: ThreadPoolExecutor | None = None
        if niceness > 0:
            # A thread of its own: without privileges, one that has stepped back cannot come forward again.
            self._behind = ThreadPoolExecutor(1, "engine-behind", step_back, (niceness,))
        self.state, self.reason = "CONNECTING", ""
        self._exchange: Exchange | None = None
        self._adoptions: queue.SimpleQueue[_Adoption] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._held: list[Message] = []
        """What came in the midst of a step and is for its end."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._spoke_s = time.monotonic()
        self.num_steps, self.step_s = 0, 0.0
        """Steps that computed something, and the time that they took."""
        self._broke_s = 0.0

    def start(self, planner: Planner, exchange: Exchange) -> None:
        self._take(_Adoption(planner, exchange, threading.Event()))
        self.state = "READY"
        self._thread.start()

    def adopt(self, planner: Planner, exchange: Exchange) -> None:
        """Take this lane and placement from the next step on; returns when it is so. Any thread may call it.

        Raises: LaneTimeoutError if the step under way does not end in time.
        """
        adoption = _Adoption(planner, exchange, threading.Event())
        self._adoptions.put(adoption)
        self._mailbox.wake()
        if not adoption.taken.wait(self._config.timeout_s):
            raise LaneTimeoutError(f"{self._worker_id} did not end its step within {self._config.timeout_s} s")

    def stop(self, timeout_s: float) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._mailbox.wake()
            self._thread.join(timeout_s)
        if self._behind is not None:
            self._behind.shutdown(wait=False)

    def hear(self) -> None:
        """Answer pulls between two layers of a step, so that sequences whose prompts are computed do not wait for the
        next prompt, and know of prompts that come; neither changes anything that the step goes by. Called by the
        thread that takes it."""
        for message in self._mailbox.receive(0.0):
            # A request does not overtake what was said before it: an abort may be of an earlier attempt.
            if isinstance(message, KvPull) or (isinstance(message, PrefillRequest) and not self._held):
                self._handle(message)
            else:
                self._held.append(message)

    def _run(self) -> None:
        step_back(COMPUTING)
        try:
            while not self._stopping.is_set():
                self._turn()
        except Exception as error:
            _log.exception("%s ends", self._worker_id)
            self.state, self.reason = "FAILED", f"{type(error).__name__}: {error}"
            self._refuse_until_stopped()

    def _turn(self) -> None:
        working = self.state == "READY" and self._engine.busy
        self._receive(0.0 if working else _IDLE_WAIT_S)
        if not working:
            self._gather()
        while not self._adoptions.empty():
            self._take(self._adoptions.get())
        now_s = time.monotonic()
        if self.state == "WAITING":
            self._wait(now_s)
            return
        try:
            self._send(self._step(now_s))
            self._keep_lane(now_s, silent=not self._engine.busy)
        except LaneError as error:
            self.state, self.reason, self._broke_s = "WAITING", f"{type(error).__name__}: {error}", now_s
            _log.warning("%s waits for another lane: %s", self._worker_id, error)
            self._report(self.reason)

    def _step(self, now_s: float) -> list[tuple[WorkerId, Message]]:
        if not self._engine.busy:
            return self._engine.step(now_s)
        begun_s = time.perf_counter()
        assert self._exchange is not None, "start comes first"
        self._exchange.gives_way = self._engine.gives_way
        if self._behind is not None and self._engine.gives_way:
            # A step's waits have deadlines of their own.
            outgoing = self._behind.submit(self._engine.step, now_s).result()
        else:
            outgoing = self._engine.step(now_s)
        self.step_s += time.perf_counter() - begun_s
        self.num_steps += 1
        reach("sampled")
        return outgoing

    def _wait(self, now_s: float) -> None:
        """For the next lane. The shards that are still there must not take the silence for death."""
        with contextlib.suppress(LaneError):
            self._keep_lane(now_s, silent=True)
        if now_s - self._broke_s > self._config.recovery_s:
            self._engine.fail_all(f"{self._worker_id} has no lane to the experts: {self.reason}", retryable=True)
        self._send(self._engine.flush())

    def _keep_lane(self, now_s: float, silent: bool) -> None:
        """A lane that carries no step carries heartbeats. Raises: LaneError."""
        if not silent:
            self._spoke_s = now_s
        elif now_s - self._spoke_s >= self._config.heartbeat_s:
            self._spoke_s = now_s
            assert self._exchange is not None
            self._exchange.heartbeat()

    def _take(self, adoption: _Adoption) -> None:
        self._routed.adopt(adoption.planner, adoption.exchange)
        self._exchange = adoption.exchange
        if self.state == "WAITING":
            self.state, self.reason = "READY", ""
        adoption.taken.set()

    def _refuse_until_stopped(self) -> None:
        """A failed worker answers what still comes, so that nobody waits for it."""
        while not self._stopping.is_set():
            self._engine.fail_all(f"{self._worker_id} failed: {self.reason}", retryable=True)
            self._send(self._engine.flush())
            self._receive(_IDLE_WAIT_S)

    def _receive(self, timeout_s: float) -> None:
        """Handle what a step has left, and what has come since. Waits only if nothing was left."""
        held, self._held = self._held, []
        for message in held + self._mailbox.receive(0.0 if held else timeout_s):
            self._handle(message)

    def _gather(self) -> None:
        """After the first of a burst, receive the others."""
        until_s = time.monotonic() + _LONGEST_BURST * self._gather_s
        while self._gather_s and self._engine.busy and self._engine.gathers and time.monotonic() < until_s:
            messages = self._mailbox.receive(self._gather_s)
            if not messages:
                return
            for message in messages:
                self._handle(message)

    def _handle(self, message: Message) -> None:
        try:
            self._engine.handle(message)
        except WireError as error:
            self._mailbox.drops.note(error)

    def _send(self, outgoing: Sequence[tuple[WorkerId, Message]]) -> None:
        for to, message in outgoing:
            try:
                self._mailbox.send(to, message)
            except UnavailableError as error:
                _log.warning("a %s is lost: %s", type(message).__name__, error)
