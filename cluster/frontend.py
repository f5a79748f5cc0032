"""The frontend: journals and streams every request; independent of gRPC and Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Collection, Mapping

from cluster.dispatcher import Dispatcher
from cluster.live_requests import Increment, LiveRequest, LiveRequests, Outcome, Reader
from cluster.plan import ServingPlan
from cluster.scheduler import admit
from cluster.validation import GenerateSpec, Limits
from model.tokenizer import Tokenizer
from octet.errors import (
    DeadlineExceededError,
    QueueFullError,
    RequestExistsError,
    UnavailableError,
    WireError,
)
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import Evicted, Failed, StepReport, TokenEvent

_log = logging.getLogger(__name__)

_ATTEMPTS = 2**20
"""Attempts that one admission may use: what is late of a request is never taken for a later one of the same id."""


@dataclasses.dataclass(slots=True)
class Totals:
    """Counts since the start. Every accepted request ends in exactly one of finished, failed, cancelled."""

    tokens: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0


class Frontend:
    """Belongs to one event loop."""

    def __init__(self, worker_id: WorkerId, plan: ServingPlan, tokenizer: Tokenizer | None, host: str) -> None:
        self._worker_id, self._config, self.tokenizer = worker_id, plan.config.frontend, tokenizer
        self._mailbox = AsyncMailbox(host)
        self._live = LiveRequests()
        self._dispatcher = Dispatcher(plan, self._mailbox, self._live, self._give_up)
        self._unavailable = "the pools are starting"
        self._idle = asyncio.Event()
        self._idle.set()
        self._reading: asyncio.Task[None] | None = None
        self._first_attempts = itertools.count(0, _ATTEMPTS)
        self.totals = Totals()
        self.limits = Limits(
            config=plan.config,
            model=plan.model,
            generation=plan.generation,
            max_model_len=plan.max_model_len,
            decode_pages=plan.decode_pages,
        )

    @property
    def address(self) -> str:
        return self._mailbox.address

    @property
    def num_live(self) -> int:
        return len(self._live)

    def serve(self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str]) -> None:
        """Accept requests from now on. The mappings give the workers' mailbox addresses."""
        self.set_workers(prefill, decode)
        self._reading = asyncio.get_running_loop().create_task(self._read())
        self._unavailable = ""

    def set_workers(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """The attention workers from now on, and their mailbox addresses. An id is one process for ever.

        What was at a worker that is not among them starts again elsewhere; reports that it still sends are dropped.
        Where a pool has nobody who may take them, requests wait up to their deadlines.

        Args:
            draining: of the workers, those that are given nothing more; what is there goes on.
        """
        self._dispatcher.set_workers(prefill, decode, draining)

    async def generate(self, spec: GenerateSpec, timeout_s: float | None = None) -> AsyncGenerator[Increment, None]:
        """Stream a request's answer. Leaving the iterator early frees the request's work in every pool.

        Args:
            timeout_s: the request's deadline; None takes `frontend.default_timeout_s`.

        Raises: UnavailableError, QueueFullError, RequestExistsError, DeadlineExceededError.
        """
        live = self._admit(spec, self._config.default_timeout_s if timeout_s is None else timeout_s)
        reader = Reader(live)
        live.readers.add(reader)
        try:
            while True:
                reader.changed.clear()
                for increment in reader.unread():
                    yield increment
                if live.outcome is not None and not reader.changed.is_set():
                    break
                await reader.changed.wait()
            if live.outcome.error is not None:
                raise live.outcome.error
        finally:
            live.readers.discard(reader)
            if not live.readers:
                # The client went away or its deadline passed: the handler was cancelled, or the iterator closed.
                self._end(live, Outcome(kind="cancelled"))

    def abort(self, request_id: RequestId) -> None:
        """End a request with finish_reason "aborted". Idempotent."""
        live = self._live.get(request_id)
        if live is not None:
            live.abort()
            self._end(live, Outcome(kind="cancelled"))

    def stop_admitting(self, reason: str) -> None:
        """Answer new requests with UnavailableError; live ones go on."""
        self._unavailable = reason

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing is live; abort what is left at the deadline."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for live in self._live.all():
            self.abort(live.request_id)

    def fail(self, reason: str) -> None:
        """The cluster cannot go on: fail every live request and admit no more."""
        self.stop_admitting(reason)
        for live in self._live.all():
            self._give_up(live, reason)

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
        self._dispatcher.close()
        self._mailbox.close()

    def _admit(self, spec: GenerateSpec, timeout_s: float) -> LiveRequest:
        if self._unavailable:
            raise UnavailableError(self._unavailable)
        if self._live.get(spec.request.request_id) is not None:
            raise RequestExistsError(f"request_id '{spec.request.request_id}' is live; use another, or abort it first")
        shed = admit(len(self._live), self._config.max_requests)
        if shed is not None:
            raise QueueFullError(shed.reason)
        request = dataclasses.replace(spec.request, frontend=self._worker_id, attempt=next(self._first_attempts))
        live = LiveRequest(spec, request, self.tokenizer)
        self._live.add(live)
        self._idle.clear()
        live.deadline = asyncio.get_running_loop().call_later(_before(timeout_s), self._expire, live, timeout_s)
        self._dispatcher.start(live, request)
        return live

    def _end(self, live: LiveRequest, outcome: Outcome) -> None:
        """The one place where a request ends, however; the first outcome counts."""
        if live.outcome is not None:
            return
        setattr(self.totals, outcome.kind, getattr(self.totals, outcome.kind) + 1)
        self._live.remove(live)
        self._dispatcher.forget(live)
        live.end(outcome)
        if not len(self._live):
            self._idle.set()

    def _give_up(self, live: LiveRequest, reason: str) -> None:
        self._end(live, Outcome(kind="failed", error=UnavailableError(reason)))

    def _expire(self, live: LiveRequest, timeout_s: float) -> None:
        reason = self._dispatcher.waits_for(live)
        if reason:
            self._give_up(live, f"{reason}, and none came within {timeout_s:g} s")
        else:
            error = DeadlineExceededError(f"it was not complete within {timeout_s:g} s")
            self._end(live, Outcome(kind="cancelled", error=error))

    async def _read(self) -> None:
        """Hand every event to the request that it belongs to."""
        while True:
            try:
                message = await self._mailbox.receive()
            except WireError as error:
                _log.error("a message is dropped: %s", error)
                continue
            if not isinstance(message, StepReport):
                _log.error("a %s is dropped: a frontend takes step reports only", type(message).__name__)
                continue
            if self._dispatcher.report(message.worker_id, message.load):
                for event in message.events:
                    self._take(event, message.worker_id)

    def _take(self, event: TokenEvent | Evicted | Failed, worker_id: WorkerId) -> None:
        """Commit a token, or compute its choice again. What is not of a live attempt is dropped."""
        live = self._live.get(event.request_id)
        if live is None or not live.journal.is_live(event.choice, event.attempt):
            if isinstance(event, TokenEvent) and event.finish_reason is None:
                # An abort may overtake the hand-off: then it is said again to whoever computes the token now.
                self._dispatcher.abort(worker_id, event.request_id, event.choice, event.attempt)
            return
        match event:
            case TokenEvent():
                if live.commit(event):
                    self.totals.tokens += 1
                    self._dispatcher.note_token(live, event, worker_id)
                    if live.journal.ended:
                        self._end(live, Outcome(kind="finished"))
            case Evicted():
                self._dispatcher.evicted(live, event)
            case Failed(reason=reason, retryable=True):
                self._dispatcher.failed(live, event, worker_id)
            case Failed(reason=reason):
                self._give_up(live, reason)


def _before(timeout_s: float) -> float:
    """A little earlier than the client's own clock runs out, so that it hears why."""
    return timeout_s - min(0.2, timeout_s / 20)
