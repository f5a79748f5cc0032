"""The prefill engine: one `step` computes the next chunk of the requests in front of the queue.

Shapes: `T` tokens of a span, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from model.batch import Span, Wanted
from model.runner import ModelRunner, tensor_bytes
from model.sampler import NO_TOKEN, NO_TOKEN_REASON, SampleRow, logprobs, sample
from octet.config import PrefillConfig
from octet.errors import ExpertMissingError, WireError
from octet.ids import Epoch, LeaseId, WorkerId
from octet.messages import (
    Abort,
    Failed,
    KvAck,
    KvOffer,
    KvPull,
    KvRenew,
    Message,
    PrefillRequest,
    StepReport,
    TokenEvent,
    TokenLogprob,
    WorkerLoad,
)
from prefill.bursts import Bursts
from prefill.prefix_cache import PrefixCache
from prefill.queue import STEPPED_BACK, Chunk, PrefillQueue, Task
from router.kv_sender import KvSender
from router.leases import LeaseTable

_LOGPROB_ROWS = 64
"""Prompt log-probabilities are taken this many rows at a time: a row of logits is as long as the vocabulary."""


class PrefillEngine:
    """Messages in by `handle`, messages out of `step`. Belongs to one thread.

    A request's pages are allocated when it starts, all at once, so that two half-computed prompts never wait for each
    other's pages.
    """

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        runner: ModelRunner,
        leases: LeaseTable,
        sender: KvSender,
        config: PrefillConfig,
        is_beside: Callable[[WorkerId], bool] = lambda decode_worker: False,
        few_requests: int = 0,
    ) -> None:
        """
        Args:
            is_beside: whether a decode worker computes on this one's cores.
            few_requests: with so many, what runs beside goes first; see `gives_way`.
        """
        self._is_beside, self._few_requests = is_beside, few_requests
        self._worker_id, self._epoch = worker_id, epoch
        self._runner, self._pool, self._leases, self._sender = runner, runner.pool, leases, sender
        self._chunk_tokens = config.chunk_tokens
        self._queue, self._bursts = PrefillQueue(config.max_requests), Bursts(config.gather_s)
        self._outbox: list[tuple[WorkerId, Message]] = []
        self._events: dict[WorkerId, list[TokenEvent | Failed]] = defaultdict(list)
        self._lease_numbers = itertools.count()
        self._num_tokens = self._num_cached = 0
        self._cache = PrefixCache(runner.pool, lookahead=int(runner.drafts)) if config.prefix_cache else None

    @property
    def busy(self) -> bool:
        """Whether `step` would compute something now: a request that waits for pages is no work yet."""
        task = self._queue.next_to_admit()
        return bool(self._queue.running) or (task is not None and self._fits(task))

    @property
    def gives_way(self) -> bool:
        """Whether running streams go first: few requests are here, and a decode worker is on the same cores."""
        if self._queue.num_tasks > self._few_requests:
            return False
        return any(self._is_beside(task.request.decode_worker) for task in (*self._queue.running, *self._queue.waiting))

    @property
    def gathers(self) -> bool:
        """Whether others are expected to come, and would be computed with those that are here."""
        if not self._bursts.expected:
            return False
        tasks = (*self._queue.running, *self._queue.waiting)
        return sum(task.remaining for task in tasks) < self._budget

    def handle(self, message: Message) -> None:
        match message:
            case PrefillRequest():
                self._bursts.note(message.arrival_s)
                self._queue.add(message)
            case KvPull():
                self._sender.answer(message)
            case KvRenew(lease_id=lease_id):
                self._leases.renew(lease_id)
            case KvAck(lease_id=lease_id):
                self._leases.acknowledge(lease_id)
            case Abort(request_id=request_id, choice=choice, attempt=attempt):
                for task in self._queue.remove(request_id, choice, attempt):
                    self._pool.release(task.pages)
                self._leases.abort(request_id, choice, attempt)
            case _:
                raise WireError(f"a prefill worker takes no {type(message).__name__}")

    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]:
        """Compute one chunk; return what it brought forth. Raises: LaneError, and then nothing has changed."""
        self._pool.release(self._leases.reclaim(now_s))
        self._admit()
        chunks = self._queue.chunks(self._budget)
        if chunks:
            try:
                hidden = self._run(chunks)
            except ExpertMissingError as error:
                # What waits was not asked for, and what was may be answered elsewhere, or later.
                for chunk in chunks:
                    self._queue.finish(chunk.task)
                self._fail([chunk.task for chunk in chunks], str(error), retryable=True)
            else:
                if self._runner.drafts:
                    self._write_draft_kv(chunks, hidden)
                self._advance(chunks, hidden, now_s)
        return self._collect()

    def fail_all(self, reason: str, retryable: bool = False) -> None:
        """End every request here; `step` or `flush` tells their frontends.

        Args:
            retryable: see `Failed`.
        """
        self._fail(self._queue.clear(), reason, retryable)

    def flush(self) -> list[tuple[WorkerId, Message]]:
        """What there is to tell, without computing."""
        return self._collect()

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            kv_pages_total=self._pool.num_pages,
            kv_pages_free=self._pool.num_free,
            running=len(self._queue.running),
            waiting=len(self._queue.waiting),
            tokens=self._num_tokens,
            cached_tokens=self._num_cached,
            leases=len(self._leases),
            begun_tokens=sum(len(task.token_ids) - task.num_cached for task in self._queue.running),
        )

    def _admit(self) -> None:
        while (task := self._queue.next_to_admit()) is not None:
            cached = self._cached_pages(task)
            # Held before the rest is allocated, which could otherwise give them out.
            self._pool.share(cached)
            rest = self._pool.allocate(self._pages_of(task) - len(cached))
            if rest is None:
                self._pool.release(cached)
                return
            num_cached = len(cached) * self._pool.page_size
            self._num_cached += num_cached
            self._queue.admit(task, [*cached, *rest], num_cached)

    def _fits(self, task: Task) -> bool:
        missing = self._pages_of(task) - self._pool.num_free
        # Cached pages that somebody holds are there already, and none of the free ones.
        return missing <= 0 or missing <= self._pool.num_held(self._cached_pages(task))

    def _cached_pages(self, task: Task) -> list[int]:
        # The log-probabilities of a prompt take every position's hidden state.
        if self._cache is None or _wants_prompt_logprobs(task):
            return []
        return self._cache.find(task.prompt_ids)

    def _pages_of(self, task: Task) -> int:
        return self._pool.pages_for(len(task.token_ids))

    def _advance(self, chunks: Sequence[Chunk], hidden: Sequence[torch.Tensor], now_s: float) -> None:
        for chunk, hidden_TH in zip(chunks, hidden, strict=True):
            task = chunk.task
            if _wants_prompt_logprobs(task):
                self._note_prompt_logprobs(chunk, hidden_TH)
            self._num_tokens += chunk.stop - task.done
            task.done = chunk.stop
        finished = [(chunk.task, h_TH[-1]) for chunk, h_TH in zip(chunks, hidden, strict=True) if chunk.last]
        if finished:
            logits = self._runner.logits(torch.stack([last_H for _, last_H in finished]))
            for (task, last_H), logits_V in zip(finished, logits, strict=True):
                self._finish(task, logits_V, last_H, now_s)

    def _run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """The hidden states of each chunk that somebody reads. Raises: LaneError."""
        spans = [self._spans(chunk) for chunk in chunks]
        hidden = iter(self._runner.run([span for parts in spans for span in parts]))
        return [torch.cat([next(hidden) for _ in parts]) for parts in spans]

    def _spans(self, chunk: Chunk) -> list[Span]:
        """The chunk's part of a prompt, and of an answer that is computed again: its tokens attend one by one, as they
        did when they were written, so that it goes on with the same bits."""
        task = chunk.task
        last: Wanted = "last" if chunk.last else "none"
        before: Wanted = "none"
        if self._runner.drafts or _wants_prompt_logprobs(task):
            last = before = "all"
        cut = chunk.stop
        if self._runner.invariant:
            cut = min(max(task.done, task.request.num_prompt_tokens), chunk.stop)
        parts = [(task.done, cut, False), (cut, chunk.stop, True)]
        return [
            Span(
                token_ids=task.token_ids[start:stop],
                start=start,
                pages=task.pages,
                by_token=by_token,
                wanted=last if stop == chunk.stop else before,
            )
            for start, stop, by_token in parts
            if start < stop
        ]

    def _write_draft_kv(self, chunks: Sequence[Chunk], hidden: Sequence[torch.Tensor]) -> None:
        """The MTP layer's part of the pages. What a prompt's last position holds is up to each choice's first token."""
        spans, kept = [], []
        for chunk, h_TH in zip(chunks, hidden, strict=True):
            task = chunk.task
            ahead = task.token_ids[task.done + 1 : chunk.stop + 1]
            if ahead:
                spans.append(Span(token_ids=ahead, start=task.done, pages=task.pages))
                kept.append(h_TH[: len(ahead)])
        if spans:
            self._runner.write_draft_kv(spans, kept)

    def _finish(self, task: Task, logits_V: torch.Tensor, last_H: torch.Tensor, now_s: float) -> None:
        """Sample the next token of every choice, and offer the pages to the decode worker if any goes on."""
        request = task.request
        self._queue.finish(task)
        rows = [_sample_row(task, choice) for choice in request.choices]
        logits = logits_V.expand(len(rows), -1)
        tokens = sample(logits, rows)
        if NO_TOKEN in tokens:
            self._fail([task], NO_TOKEN_REASON, retryable=False)
            return
        if self._cache is not None:
            self._cache.add(task.prompt_ids, task.pages)
        num_top = request.output.logprobs
        reported = None if num_top is None else logprobs(logits, tokens, num_top)
        going_on: list[tuple[int, int]] = []
        for position, (choice, token_id) in enumerate(zip(request.choices, tokens, strict=True)):
            reason = request.stopping.finish_reason(token_id, rows[position].num_new_tokens + 1)
            if reason is None:
                going_on.append((choice, token_id))
            self._events[request.frontend].append(
                TokenEvent(
                    request_id=request.request_id,
                    choice=choice,
                    attempt=request.attempt,
                    index=rows[position].num_new_tokens,
                    token_id=token_id,
                    finish_reason=reason,
                    logprob=reported[position] if reported else None,
                    prompt_logprobs=tuple(task.prompt_logprobs) if position == 0 else (),
                    cached_tokens=task.num_cached,
                )
            )
        if going_on:
            self._offer(task, going_on, last_H, now_s)
        else:
            self._pool.release(task.pages)

    def _offer(self, task: Task, going_on: list[tuple[int, int]], last_H: torch.Tensor, now_s: float) -> None:
        request = task.request
        choices = tuple(choice for choice, _ in going_on)
        lease_id = LeaseId(f"{self._worker_id}/{self._epoch}/{next(self._lease_numbers)}")
        self._leases.grant(lease_id, request.request_id, request.attempt, choices, task.pages, now_s)
        offer = KvOffer(
            lease_id=lease_id,
            source=self._worker_id,
            request=dataclasses.replace(request, choices=choices),
            next_tokens=tuple(token_id for _, token_id in going_on),
            hidden=tensor_bytes(last_H) if self._runner.drafts else b"",
            lease_s=self._leases.lease_s,
            following=self._num_following(request.decode_worker),
        )
        self._outbox.append((request.decode_worker, offer))

    def _num_following(self, decode_worker: WorkerId) -> int:
        if not self._is_beside(decode_worker):
            return 0
        return sum(
            task.request.decode_worker == decode_worker and _goes_on(task)
            for task in self._queue.next_to_finish(self._budget)
        )

    @property
    def _budget(self) -> int:
        """Tokens of the next chunk: fewer where others wait for its frames, and for its parts of a layer, to pass."""
        return max(1, self._chunk_tokens // STEPPED_BACK) if self.gives_way else self._chunk_tokens

    def _note_prompt_logprobs(self, chunk: Chunk, hidden_TH: torch.Tensor) -> None:
        """Row t predicts token t + 1; the first token of a prompt has no prediction."""
        task = chunk.task
        if task.done == 0:
            task.prompt_logprobs.append(TokenLogprob(token_id=task.token_ids[0], logprob=None))
        targets = task.token_ids[task.done + 1 : chunk.stop + 1]
        for first in range(0, len(targets), _LOGPROB_ROWS):
            part = targets[first : first + _LOGPROB_ROWS]
            logits = self._runner.logits(hidden_TH[first : first + len(part)])
            task.prompt_logprobs += logprobs(logits, part, task.request.output.logprobs or 0)

    def _fail(self, tasks: Sequence[Task], reason: str, retryable: bool) -> None:
        """End tasks that the queue has let go of."""
        for task in tasks:
            self._pool.release(task.pages)
            for choice in task.request.choices:
                self._events[task.request.frontend].append(
                    Failed(
                        request_id=task.request.request_id,
                        choice=choice,
                        attempt=task.request.attempt,
                        reason=reason,
                        retryable=retryable,
                    )
                )

    def _collect(self) -> list[tuple[WorkerId, Message]]:
        load = self.load()
        reports: list[tuple[WorkerId, Message]] = [
            (
                frontend,
                StepReport(worker_id=self._worker_id, epoch=self._epoch, events=tuple(events), load=load),
            )
            for frontend, events in self._events.items()
        ]
        outbox, self._outbox = self._outbox, []
        self._events.clear()
        return reports + outbox


def _sample_row(task: Task, choice: int) -> SampleRow:
    request = task.request
    return SampleRow(
        sampling=request.sampling,
        stopping=request.stopping,
        output=request.output,
        choice=choice,
        token_ids=task.token_ids,
        num_prompt_tokens=request.num_prompt_tokens,
    )


def _goes_on(task: Task) -> bool:
    """Whether a choice will take more tokens than the next one, unless that stops it."""
    request = task.request
    return len(task.token_ids) - request.num_prompt_tokens + 1 < request.stopping.max_new_tokens


def _wants_prompt_logprobs(task: Task) -> bool:
    """A recomputed choice has reported them before its first token."""
    return task.request.output.prompt_logprobs and len(task.token_ids) == task.request.num_prompt_tokens
