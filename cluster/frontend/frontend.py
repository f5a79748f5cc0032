"""The frontend: journals and streams every request; independent of gRPC and Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence

from cluster.frontend.admission import Demand
from cluster.frontend.audit import Audit
from cluster.frontend.dispatcher import Dispatcher
from cluster.frontend.histograms import RequestHistograms
from cluster.frontend.intake import Intake, Totals
from cluster.frontend.live_requests import LiveRequest, LiveRequests
from cluster.frontend.record import Outcome, Reader, Record
from cluster.frontend.request_meter import RequestLoad
from cluster.frontend.results import KeptResults
from cluster.frontend.validation import GenerateSpec, Limits
from cluster.plan import ServingPlan
from model.tokenizer import Tokenizer
from octet.errors import (
    DeadlineExceededError,
    RequestCancelledError,
    RequestExistsError,
    RequestFailedError,
    RequestUnknownError,
    WireError,
)
from octet.faults import reach
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import Evicted, Failed, StepReport, TokenEvent

_log = logging.getLogger(__name__)

_ATTEMPTS = 2**20
"""Attempts that one admission may use: what is late of a request is never taken for a later one of the same id."""


class Frontend:
    """Belongs to one event loop."""

    def __init__(
        self, worker_id: WorkerId, plan: ServingPlan, tokenizer: Tokenizer | None, mailbox: AsyncMailbox
    ) -> None:
        """
        Args:
            mailbox: this object's from now on.
        """
        self._worker_id, self._config, self.tokenizer = worker_id, plan.config.frontend, tokenizer
        self._mailbox = mailbox
        self._live = LiveRequests()
        self._kept = KeptResults(self._config)
        self._intake = Intake(self._config, plan.config.autoscaler)
        self._dispatcher = Dispatcher(plan, self._mailbox, self._live, self._give_up, self._sent)
        self._audit = Audit(plan.config.chaos.audit_dir, worker_id)
        self._idle = asyncio.Event()
        self._idle.set()
        self._reading: asyncio.Task[None] | None = None
        # Anywhere: what is late of a frontend that was here before is not taken for ours either.
        self._first_attempts = itertools.count(secrets.randbits(31) * _ATTEMPTS, _ATTEMPTS)
        self.limits = Limits.of(plan)

    @property
    def address(self) -> str:
        return self._mailbox.address

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def deaf(self) -> bool:
        """Whether it has ceased to read what workers report: no request goes on here, and another one has to serve."""
        return self._reading is not None and self._reading.done()

    @property
    def totals(self) -> Totals:
        return self._intake.totals

    @property
    def histograms(self) -> RequestHistograms:
        return self._intake.histograms

    @property
    def num_strangers(self) -> int:
        """Connections of strangers to its mailbox, which were refused."""
        return self._mailbox.num_refused

    @property
    def num_dropped(self) -> int:
        """What came to its mailbox and was no message, or none that it takes."""
        return self._mailbox.drops.num

    def serve(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """Accept requests from now on. See `set_workers`.

        What the workers still compute for a frontend that was here before is ended with the first token of it.
        """
        self.set_workers(prefill, decode, draining)
        self._reading = asyncio.get_running_loop().create_task(self._read())
        self._reading.add_done_callback(self._over)
        self._intake.closed = ""

    def set_workers(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId] = ()
    ) -> None:
        """The attention workers from now on, and their mailbox addresses. An id is one process for ever.

        What was at a worker that is not among them starts again elsewhere; reports that it still sends are dropped.
        Where a pool has nobody who may take them, requests wait up to their deadlines.

        Args:
            draining: of the workers, those that are given nothing more; what is there goes on.
        """
        self._audit.workers({**prefill, **decode})
        self._dispatcher.set_workers(prefill, decode, draining)

    @contextlib.contextmanager
    def generate(self, spec: GenerateSpec, timeout_s: float | None = None, *, whole: bool = False) -> Iterator[Reader]:
        """Accept a request, or find the one that it repeats, and read its answer after the tokens that are received.

        When its last reader leaves, the request's work is freed in every pool, a resumable one's after
        `frontend.resume_grace_s`.

        Args:
            timeout_s: the request's deadline, if it has no later one; None takes `frontend.default_timeout_s`.
            whole: whether the reader is told nothing before the request has ended.

        Raises: UnavailableError, QueueFullError, RequestExistsError, RequestError.
        """
        record = self._find_same(spec)
        if record is None:
            record = self._admit(spec, timeout_s).record
        with self._attached(record, [len(token_ids) for token_ids in spec.received], timeout_s, whole) as reader:
            yield reader

    def refuse_early(self, request_id: RequestId, priority: int, timeout_s: float | None) -> None:
        """Refuse a request before it is parsed, if a prompt of a single token would be. Known ones never are.

        Raises: UnavailableError, QueueFullError.
        """
        if self._find(request_id) is None:
            self._check(self._intake.unread(priority, timeout_s))

    @contextlib.contextmanager
    def resume(self, request_id: RequestId, offsets: Sequence[int], timeout_s: float | None = None) -> Iterator[Reader]:
        """Read the answer of a request that is live or kept, from these tokens of its choices on.

        Raises: RequestUnknownError, RequestError.
        """
        record = self._find(request_id)
        if record is None:
            raise RequestUnknownError(f"no request '{request_id}' is live or kept")
        with self._attached(record, offsets, timeout_s) as reader:
            yield reader

    def abort(self, request_id: RequestId) -> None:
        """End a request with finish_reason "aborted". Idempotent."""
        live = self._live.get(request_id)
        if live is not None:
            live.abort()
            self._end(live, Outcome(kind="cancelled"))

    def stop_admitting(self, reason: str) -> None:
        """Answer new requests with UnavailableError; live ones go on."""
        self._intake.closed = reason

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
            self._reading = None
        self._dispatcher.close()
        self._mailbox.close()
        self._audit.close()

    def _find(self, request_id: RequestId) -> Record | None:
        live = self._live.get(request_id)
        return live.record if live is not None else self._kept.get(request_id, _now_s())

    def _find_same(self, spec: GenerateSpec) -> Record | None:
        """The request that this one repeats. One that failed or was cancelled is not repeated but begun anew."""
        record = self._find(spec.request.request_id)
        if record is None or (record.outcome is not None and record.outcome.kind != "finished"):
            return None
        if record.digest != spec.digest:
            raise RequestExistsError(
                f"request_id '{record.request_id}' belongs to a request with another body, live or kept; use another id"
            )
        record.check_received(spec.received)
        return record

    def _check(self, demand: Demand) -> None:
        """Raises: UnavailableError, QueueFullError."""
        self._intake.check(demand, self._dispatcher.free_places(demand.prompt_tokens))

    def _admit(self, spec: GenerateSpec, timeout_s: float | None) -> LiveRequest:
        demand = self._intake.demand(spec, timeout_s)
        self._check(demand)
        request = dataclasses.replace(spec.request, frontend=self._worker_id, attempt=next(self._first_attempts))
        live = LiveRequest(spec, request, demand, self.tokenizer, self.limits.most_choices)
        self._intake.accept(live, _now_s())
        self._kept.forget(live.request_id)
        self._live.add(live)
        self._audit.accept(live.request_id, [len(token_ids) for token_ids in spec.received])
        self._idle.clear()
        for each in live.first_requests():
            self._dispatcher.start(live, each)
        if live.journal.ended:
            self._end(live, Outcome(kind="finished"))
        return live

    @contextlib.contextmanager
    def _attached(
        self, record: Record, offsets: Sequence[int], timeout_s: float | None, whole: bool = False
    ) -> Iterator[Reader]:
        """Let a request run for a reader up to the reader's deadline, and no longer than for its last one."""
        live = self._live.get(record.request_id)
        reader = Reader(record, offsets, self._config.max_unread_tokens, whole=whole)
        record.readers.add(reader)
        if live is not None:
            live.set_timer("grace", None)
            self._prolong(live, self._intake.timeout_s(timeout_s))
        try:
            yield reader
        finally:
            record.readers.discard(reader)
            if live is not None and not record.readers:
                self._left_alone(live)

    def _left_alone(self, live: LiveRequest) -> None:
        """The last client went away, or its deadline passed: its handler was cancelled."""
        if not live.resumable:
            error = RequestCancelledError("its client left, and it was not `resumable`: nobody reads it any more")
            self._end(live, Outcome(kind="cancelled", error=error))
        elif live.record.outcome is None:
            grace_s = self._config.resume_grace_s
            error = RequestCancelledError(f"nobody reads it any more, for {grace_s:g} s (frontend.resume_grace_s)")
            outcome = Outcome(kind="cancelled", error=error)
            live.set_timer("grace", asyncio.get_running_loop().call_later(grace_s, self._end, live, outcome))

    def _prolong(self, live: LiveRequest, timeout_s: float) -> None:
        """A little less than its client's time, so that the client hears how it ended."""
        deadline_s = _now_s() + timeout_s - min(0.2, timeout_s / 20)
        if deadline_s > live.deadline_s:
            live.deadline_s = deadline_s
            timer = asyncio.get_running_loop().call_later(deadline_s - _now_s(), self._expire, live, timeout_s)
            live.set_timer("deadline", timer)

    def _end(self, live: LiveRequest, outcome: Outcome) -> None:
        """The one place where a request ends, however; the first outcome counts."""
        if live.record.outcome is not None:
            return
        self._audit.end(live.request_id, outcome.kind)
        self._intake.end(live, outcome, _now_s())
        self._live.remove(live)
        self._dispatcher.forget(live)
        for name in list(live.timers):
            live.set_timer(name, None)
        live.record.end(outcome)
        if live.keep:
            self._kept.keep(live.record, _now_s())
        if not len(self._live):
            self._idle.set()

    def _sent(self, prompt_tokens: int, cached_tokens: int) -> None:
        self._intake.sent(prompt_tokens, cached_tokens, _now_s())

    def request_load(self) -> RequestLoad:
        """Of the last `autoscaler.look_back_period_s`."""
        waiting = sum(not live.prefilled for live in self._live.all())
        return self._intake.request_load(_now_s(), self._dispatcher.unanswered_prompt_tokens, waiting)

    def _give_up(self, live: LiveRequest, reason: str) -> None:
        self._end(live, Outcome(kind="failed", error=RequestFailedError(reason)))

    def _expire(self, live: LiveRequest, timeout_s: float) -> None:
        reason = self._dispatcher.waits_for(live)
        if reason:
            self._give_up(live, f"{reason}, and none came within {round(timeout_s, 2):g} s")
        else:
            error = DeadlineExceededError(f"it was not complete within {round(timeout_s, 2):g} s")
            self._end(live, Outcome(kind="cancelled", error=error))

    async def _read(self) -> None:
        """Hand every event to the request that it belongs to."""
        while True:
            message = await self._mailbox.receive()
            if not isinstance(message, StepReport):
                found = type(message).__name__
                self._mailbox.drops.note(WireError(f"found a {found}, expected a StepReport, all that it takes"))
                continue
            if self._dispatcher.report(message.worker_id, message.load):
                for event in message.events:
                    try:
                        self._take(event, message.worker_id)
                    except Exception as error:
                        # Without the reading, no other request would ever hear of its tokens.
                        self._break_off(event.request_id, error)
            # Messages that are there already are received without a pause, in which others have their turn.
            await asyncio.sleep(0)

    def _over(self, reading: asyncio.Task[None]) -> None:
        """Nobody awaits it: an error there would be heard of at the next garbage collection at best."""
        if self._reading is not None:
            error = None if reading.cancelled() else reading.exception()
            _log.error("what workers report is not read any more", exc_info=error)

    def _break_off(self, request_id: RequestId, error: Exception) -> None:
        """End a request, if it is live, of which an event could not be dealt with."""
        _log.error("an event of request %s could not be dealt with", request_id, exc_info=error)
        live = self._live.get(request_id)
        try:
            if live is not None:
                self._give_up(live, f"an internal error of the frontend: {type(error).__name__}: {error}")
        except Exception:
            _log.exception("request %s could not be given up", request_id)

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
                for each, its_worker in live.in_order(event, worker_id):
                    reach("commit")
                    if live.commit(each):
                        self._audit.commit(each, its_worker)
                        self._intake.count(live, each.choice, _now_s())
                        self._dispatcher.note_token(live, each, its_worker)
                if live.journal.ended:
                    self._end(live, Outcome(kind="finished"))
            case Evicted():
                self._dispatcher.evicted(live, event)
            case Failed(reason=reason, retryable=True):
                self._dispatcher.failed(live, event, worker_id)
            case Failed(reason=reason):
                self._give_up(live, reason)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
