"""The frontend: journals, schedules and streams every request; independent of gRPC and Ray."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Mapping

from cluster.answer import Answer, Piece, merge
from cluster.journal import Journal
from cluster.live_requests import Aborted, Event, LiveRequest, LiveRequests
from cluster.plan import ServingPlan
from cluster.prefix_index import PrefixIndex
from cluster.scheduler import Shed, schedule
from cluster.validation import GenerateSpec, Limits
from model.tokenizer import Tokenizer
from octet.errors import QueueFullError, RequestExistsError, UnavailableError, WireError
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import Abort, Evicted, Failed, PrefillRequest, StepReport, TokenEvent, TokenLogprob, unpack_ids

_log = logging.getLogger(__name__)

_ATTEMPTS = 2**20
"""Attempts that one admission may use: what is late of a request is never taken for a later one of the same id."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Increment:
    """What a request's client learns at once."""

    piece: Piece
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    usage: Usage | None = None
    """In the request's last increment."""


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
        self._worker_id, self._plan, self.tokenizer = worker_id, plan, tokenizer
        self._mailbox = AsyncMailbox(host)
        self._live = LiveRequests([], [], plan.config.kv.page_size)
        self._prefixes = PrefixIndex([], plan.config.kv.page_size, 0)
        self._unavailable = "the pools are starting"
        self._idle = asyncio.Event()
        self._idle.set()
        self._reader: asyncio.Task[None] | None = None
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
        self._mailbox.connect({**prefill, **decode})
        self._live = LiveRequests(sorted(prefill), sorted(decode), self._plan.config.kv.page_size)
        remembered = self._plan.prefill_pages if self._plan.config.prefill.prefix_cache else 0
        self._prefixes = PrefixIndex(sorted(prefill), self._plan.config.kv.page_size, remembered)
        self._reader = asyncio.get_running_loop().create_task(self._read())
        self._unavailable = ""

    async def generate(self, spec: GenerateSpec) -> AsyncGenerator[Increment, None]:
        """Stream a request's answer. Leaving the iterator early frees the request's work in every pool.

        Raises: UnavailableError, QueueFullError, RequestExistsError.
        """
        live = self._admit(spec)
        answers = {
            choice: Answer(choice, self.tokenizer, spec.request.stopping, spec.stop_strings)
            for choice in spec.request.choices
        }
        first: TokenEvent | None = None
        aborted = False
        try:
            while not live.journal.ended:
                events = await _next_events(live.events)
                pieces = self._apply(events, live, answers)
                first = first or next((event for event in events if isinstance(event, TokenEvent)), None)
                for number, piece in enumerate(pieces):
                    aborted |= piece.finish_reason == "aborted"
                    opening = piece.offset == 0 and piece.choice == spec.request.choices[0]
                    last = live.journal.ended and number == len(pieces) - 1
                    yield Increment(
                        piece=piece,
                        prompt_logprobs=first.prompt_logprobs if opening and first is not None else (),
                        usage=self._usage(live, first) if last else None,
                    )
            if aborted:
                self.totals.cancelled += 1
            else:
                self.totals.finished += 1
        except UnavailableError:
            self.totals.failed += 1
            raise
        except BaseException:
            # The client went away or its deadline passed; the handler was cancelled or the iterator closed.
            self.totals.cancelled += 1
            raise
        finally:
            self._release(live)

    def abort(self, request_id: RequestId) -> None:
        """End a request with finish_reason "aborted". Idempotent."""
        live = self._live.get(request_id)
        if live is not None:
            live.events.put_nowait(Aborted())

    def stop_admitting(self, reason: str) -> None:
        """Answer new requests with UnavailableError; live ones go on."""
        self._unavailable = reason

    async def drain(self, timeout_s: float) -> None:
        """Wait until nothing is live; abort what is left at the deadline."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        for live in self._live.all():
            live.events.put_nowait(Aborted())

    def fail(self, reason: str) -> None:
        """The cluster cannot go on: fail every live request and admit no more."""
        self.stop_admitting(reason)
        for live in self._live.all():
            for choice in live.journal.live_choices():
                live.events.put_nowait(_failure(live, choice, reason))

    def close(self) -> None:
        if self._reader is not None:
            self._reader.cancel()
        self._mailbox.close()

    def _admit(self, spec: GenerateSpec) -> LiveRequest:
        if self._unavailable:
            raise UnavailableError(self._unavailable)
        if self._live.get(spec.request.request_id) is not None:
            raise RequestExistsError(f"request_id '{spec.request.request_id}' is live; use another, or abort it first")
        request = dataclasses.replace(spec.request, frontend=self._worker_id, attempt=next(self._first_attempts))
        others = len(self._live)
        live = self._live.add(Journal(request))
        self._idle.clear()
        try:
            self._start(live, request, others)
        except BaseException:
            self._release(live)
            raise
        return live

    def _start(self, live: LiveRequest, request: PrefillRequest, others: int = 0) -> None:
        """Send a request, or an evicted choice of one, on its way.

        Args:
            others: live requests beside a new one. One that was admitted is never shed when it is computed again.
        """
        token_ids = unpack_ids(request.token_ids)
        cached_tokens = self._prefixes.cached_tokens(token_ids)
        prefill_views = self._live.prefill_views(cached_tokens)
        max_requests = self._plan.config.frontend.max_requests
        decision = schedule(others, max_requests, prefill_views, self._live.decode_views())
        if isinstance(decision, Shed):
            raise QueueFullError(decision.reason)
        self._prefixes.sent(decision.prefill, token_ids)
        self._live.assign(live, request.choices, len(token_ids), cached_tokens[decision.prefill], decision)
        self._mailbox.send(decision.prefill, dataclasses.replace(request, decode_worker=decision.decode))

    def _apply(self, events: list[Event | Aborted], live: LiveRequest, answers: Mapping[int, Answer]) -> list[Piece]:
        """Commit events; the pieces that they add, one per choice."""
        pieces: list[Piece] = []
        for event in events:
            match event:
                case TokenEvent():
                    if live.journal.commit(event):
                        self._live.note_token(live, event)
                        pieces.append(self._answer(event, live, answers[event.choice]))
                case Evicted():
                    again = live.journal.restart(event)
                    if again is not None:
                        self._start(live, again)
                case Failed(choice=choice, attempt=attempt, reason=reason):
                    if live.journal.is_live(choice, attempt):
                        raise UnavailableError(reason)
                case Aborted():
                    for choice in live.journal.live_choices():
                        pieces.append(answers[choice].abort())
                        live.journal.end(choice)
        return merge(pieces)

    def _answer(self, event: TokenEvent, live: LiveRequest, answer: Answer) -> Piece:
        self.totals.tokens += 1
        piece = answer.push(event)
        if piece.finish_reason is not None:
            live.journal.end(event.choice)
            stage = live.stages.pop(event.choice)
            if event.finish_reason is None:
                # A stop string: the worker does not know that the choice is over.
                self._tell(stage.decode, Abort(request_id=live.request_id, choice=event.choice))
        return piece

    def _release(self, live: LiveRequest) -> None:
        """Forget a request, and let every worker that still computes it do so too."""
        self._live.remove(live)
        if not len(self._live):
            self._idle.set()
        workers = {worker for stage in live.stages.values() for worker in (stage.prefill, stage.decode)}
        for worker_id in sorted(workers):
            self._tell(worker_id, Abort(request_id=live.request_id))

    def _usage(self, live: LiveRequest, first: TokenEvent | None) -> Usage:
        return Usage(
            prompt_tokens=live.journal.request.num_prompt_tokens,
            completion_tokens=live.journal.num_completion_tokens,
            cached_tokens=first.cached_tokens if first else 0,
        )

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
            self._live.loads[message.worker_id] = message.load
            for event in message.events:
                live = self._live.get(event.request_id)
                goes_on = isinstance(event, TokenEvent) and event.finish_reason is None
                if live is not None:
                    live.events.put_nowait(event)
                # An abort may overtake the hand-off: then it is said again to whoever computes the token now.
                if goes_on and live is None:
                    self._tell(message.worker_id, Abort(request_id=event.request_id))
                elif goes_on and live is not None and live.journal.has_ended(event.choice):
                    self._tell(message.worker_id, Abort(request_id=event.request_id, choice=event.choice))

    def _tell(self, to: WorkerId, message: Abort) -> None:
        try:
            self._mailbox.send(to, message)
        except UnavailableError as error:
            _log.warning("an abort is lost: %s", error)


async def _next_events(queue: asyncio.Queue[Event | Aborted]) -> list[Event | Aborted]:
    """At least one event, and whatever else waits: a slow reader gets fewer, larger pieces."""
    events = [await queue.get()]
    while not queue.empty():
        events.append(queue.get_nowait())
    return events


def _failure(live: LiveRequest, choice: int, reason: str) -> Failed:
    attempt = live.journal.attempt(choice)
    return Failed(request_id=live.request_id, choice=choice, attempt=attempt, reason=reason)
