"""The decode engine: one `step` advances every running sequence by one token, and by as many drafts as were right.

Shapes: `T` tokens computed in a step, `B` running sequences, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from decode.batch import DecodeBatch, Incoming, RunningSequence
from decode.gathering import Gathering
from decode.handoff import Arrival, KvReceiver
from decode.migration import Migration
from decode.speculation import Speculator
from model.batch import Span
from model.runner import ModelRunner, tensor_from
from model.sampler import NO_TOKEN, NO_TOKEN_REASON, logprobs, sample
from octet.config import DecodeConfig
from octet.errors import ExpertMissingError, WireError
from octet.ids import Epoch, LeaseId, RequestId, WorkerId
from octet.messages import (
    Abort,
    Evicted,
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
    unpack_ids,
)


class DecodeEngine:
    """Messages in by `handle`, messages out of `step`. Belongs to one thread."""

    gives_way = gathers = False
    """Prefill does."""

    def __init__(
        self,
        worker_id: WorkerId,
        epoch: Epoch,
        runner: ModelRunner,
        receiver: KvReceiver,
        config: DecodeConfig,
        speculator: Speculator | None = None,
        migration: Migration | None = None,
    ) -> None:
        self._worker_id, self._epoch = worker_id, epoch
        self._runner, self._pool, self._receiver, self._speculator = runner, runner.pool, receiver, speculator
        self._batch = DecodeBatch(runner.pool, config.max_batch, lookahead=int(runner.drafts))
        self._gathering, self._waits = Gathering(config.gather_s), False
        self._offers: list[KvOffer] = []
        self._incoming: dict[LeaseId, Incoming] = {}
        self._outbox: list[tuple[WorkerId, Message]] = []
        self._events: dict[WorkerId, list[TokenEvent | Evicted | Failed]] = defaultdict(list)
        self._num_tokens = 0
        self._num_preemptions = 0
        self._next_renewal_s = 0.0
        self._migration, self._heirs, self._leaving = migration, tuple[WorkerId, ...](), False

    @property
    def busy(self) -> bool:
        """Whether `step` would compute something now."""
        return bool(self._batch.running) and not self._waits

    def handle(self, message: Message) -> None:
        match message:
            case KvOffer(source=source, following=following):
                self._gathering.note(source, following)
                self._offers.append(message)
                self._offers.sort(key=lambda offer: (offer.request.priority, offer.request.arrival_s))
            case Abort():
                self._gathering.forget()
                self._abort(message)
            case KvPull() | KvRenew() | KvAck() if self._migration is not None:
                self._migration.handle(message)
            case _:
                raise WireError(f"a decode worker takes no {type(message).__name__}")

    def step(self, now_s: float) -> list[tuple[WorkerId, Message]]:
        """Advance every sequence by a token or more; return what it brought forth.

        Raises: LaneError, and then nothing has changed.
        """
        if not self._batch.running:
            self._gathering.empty()
        self._land()
        self._hand_over(now_s)
        self._evict(self._batch.grow())
        self._pull()
        self._renew(now_s)
        self._waits = bool(self._batch.running) and self._gathering.waits(now_s, len(self._incoming))
        if self.busy:
            try:
                self._decode()
            except ExpertMissingError as error:
                # Elsewhere, or later, they may be answered.
                self._fail_running(str(error), retryable=True)
            finally:
                self._batch.trim()
        return self.flush()

    def hand_over_to(self, heirs: Sequence[WorkerId]) -> None:
        """From now on, give every sequence to one of these decode workers; where there are none, back to be recomputed.

        Any thread may call it.
        """
        self._heirs = tuple(heirs)
        self._leaving = True

    def fail_all(self, reason: str, retryable: bool = False) -> None:
        """End every request here; `flush` tells their frontends.

        Args:
            retryable: see `Failed`.
        """
        self._fail_running(reason, retryable)
        told = [(offer.request, offer.request.choices) for offer in self._offers]
        for incoming in self._incoming.values():
            told.append((incoming.offer.request, tuple(choice for choice, _ in incoming.wanted)))
            incoming.dropped.update(incoming.offer.request.choices)
        self._offers.clear()
        for request, choices in told:
            for choice in choices:
                self._tell_failed(request, choice, reason, retryable)

    def flush(self) -> list[tuple[WorkerId, Message]]:
        """What there is to tell, without computing."""
        load = self.load()
        reports: list[tuple[WorkerId, Message]] = [
            (frontend, StepReport(worker_id=self._worker_id, epoch=self._epoch, events=tuple(events), load=load))
            for frontend, events in self._events.items()
        ]
        outbox, self._outbox = self._outbox, []
        self._events.clear()
        return reports + outbox

    def load(self) -> WorkerLoad:
        return WorkerLoad(
            kv_pages_total=self._pool.num_pages,
            kv_pages_free=self._pool.num_free,
            running=len(self._batch.running),
            waiting=len(self._offers) + len(self._incoming),
            tokens=self._num_tokens,
            preemptions=self._num_preemptions,
            leases=len(self._migration) if self._migration else 0,
            drafted_tokens=self._speculator.num_drafted if self._speculator else 0,
            accepted_tokens=self._speculator.num_accepted if self._speculator else 0,
        )

    def _decode(self) -> None:
        """Draft, verify all drafts in one pass, keep what stands. Raises: LaneError, before anything has changed."""
        sequences = list(self._batch.running)
        drafts = self._speculator.draft(self._batch) if self._speculator else [[] for _ in sequences]
        hidden = self._runner.run(
            [
                Span(
                    token_ids=[sequence.token_ids[-1], *drafted],
                    start=len(sequence.token_ids) - 1,
                    pages=sequence.pages,
                    by_token=True,
                )
                for sequence, drafted in zip(sequences, drafts, strict=True)
            ]
        )
        lengths = [len(sequence.token_ids) for sequence in sequences]
        self._keep(sequences, drafts, hidden)
        if self._speculator:
            kept = [
                hidden_TH[: len(sequence.token_ids) - length]
                for sequence, hidden_TH, length in zip(sequences, hidden, lengths, strict=True)
            ]
            self._speculator.note(sequences, drafts, kept)

    def _keep(
        self, sequences: Sequence[RunningSequence], drafts: Sequence[Sequence[int]], hidden: Sequence[torch.Tensor]
    ) -> None:
        """Sample every sequence's next token, and as long as that is the one drafted, the one after it.

        Each token is thus the one that would be sampled without drafts, with its own position's noise, penalties and
        stop conditions.
        """
        if not any(drafts):
            self._advance(sequences, self._runner.logits(torch.cat(list(hidden))))
            return
        by_depth = [
            [index for index, drafted in enumerate(drafts) if len(drafted) >= depth]
            for depth in range(max(map(len, drafts)) + 1)
        ]
        rows = [hidden[index][depth] for depth, indices in enumerate(by_depth) for index in indices]
        parts = self._runner.logits(torch.stack(rows)).split([len(indices) for indices in by_depth])
        standing = set(by_depth[0])
        for depth, (indices, logits_BV) in enumerate(zip(by_depth, parts, strict=True)):
            chosen = [row for row, index in enumerate(indices) if index in standing]
            if not chosen:
                return
            logits_BV = logits_BV if len(chosen) == len(indices) else logits_BV[chosen]
            self._advance([sequences[indices[row]] for row in chosen], logits_BV)
            standing = {
                index
                for index in (indices[row] for row in chosen)
                if not sequences[index].ended
                and sequences[index].token_ids[-1:] == list(drafts[index][depth : depth + 1])
            }

    def _advance(self, sequences: Sequence[RunningSequence], logits_BV: torch.Tensor) -> None:
        """Sample, append, report; sequences that end leave the batch."""
        tokens = sample(logits_BV, [sequence.sample_row() for sequence in sequences])
        reported = self._logprobs(logits_BV, sequences, tokens)
        for index, (sequence, token_id) in enumerate(zip(sequences, tokens, strict=True)):
            request = sequence.request
            if token_id == NO_TOKEN:
                sequence.ended = True
                self._batch.remove(sequence)
                self._tell_failed(request, sequence.choice, NO_TOKEN_REASON, retryable=False)
                continue
            self._num_tokens += 1
            sequence.token_ids.append(token_id)
            reason = request.stopping.finish_reason(token_id, sequence.num_new_tokens)
            self._events[request.frontend].append(
                TokenEvent(
                    request_id=request.request_id,
                    choice=sequence.choice,
                    attempt=request.attempt,
                    index=sequence.num_new_tokens - 1,
                    token_id=token_id,
                    finish_reason=reason,
                    logprob=reported.get(index),
                )
            )
            if reason is not None:
                sequence.ended = True
                self._batch.remove(sequence)

    @staticmethod
    def _logprobs(
        logits_BV: torch.Tensor, sequences: Sequence[RunningSequence], tokens: list[int]
    ) -> dict[int, TokenLogprob]:
        asked = [
            (index, sequence.request.output.logprobs)
            for index, sequence in enumerate(sequences)
            if sequence.request.output.logprobs is not None and tokens[index] != NO_TOKEN
        ]
        return {index: logprobs(logits_BV[index : index + 1], [tokens[index]], num)[0] for index, num in asked}

    def _land(self) -> None:
        """Let arrived pages become running sequences."""
        for arrival in self._receiver.arrived():
            incoming = self._incoming.pop(arrival.lease_id)
            if arrival.reason or not incoming.wanted:
                self._turn_away(incoming, arrival)
                continue
            for source, target in self._batch.admit(incoming, self._last_hidden(incoming.offer)):
                self._runner.cache.copy_page(source, target)
            self._acknowledge(incoming.offer)

    def _hand_over(self, now_s: float) -> None:
        if self._migration is not None:
            self._pool.release(self._migration.reclaim(now_s))
        if not self._leaving:
            return
        for sequence in list(self._batch.running):
            # What a drafter has not seen yet is not handed over: such a sequence is computed again.
            if self._migration is not None and self._heirs and self._speculator is None:
                self._batch.detach(sequence)
                self._outbox.append(self._migration.offer(sequence, self._heirs, now_s))
            else:
                self._batch.remove(sequence)
                request, reason = sequence.request, "its decode worker leaves"
                self._tell_evicted(request.request_id, sequence.choice, request.attempt, request.frontend, reason)

    def _last_hidden(self, offer: KvOffer) -> list[torch.Tensor]:
        """The position `[1, H]` that no drafter has seen yet: what comes there is up to the first token."""
        if self._speculator is None:
            return []
        return [tensor_from(offer.hidden, self._runner.cache.dtype, self._runner.cache.device).unsqueeze(0)]

    def _turn_away(self, incoming: Incoming, arrival: Arrival) -> None:
        self._pool.release(incoming.pages)
        self._acknowledge(incoming.offer)
        request = incoming.offer.request
        for choice, _ in incoming.wanted:
            self._tell_evicted(request.request_id, choice, request.attempt, request.frontend, arrival.reason)

    def _pull(self) -> None:
        """Ask for the pages of waiting offers, oldest first, as far as there is room."""
        while self._offers:
            offer = self._offers[0]
            pages = self._batch.reserve(offer, self._incoming.values())
            if pages is None:
                return
            del self._offers[0]
            token_ids = unpack_ids(offer.request.token_ids)
            self._incoming[offer.lease_id] = Incoming(offer=offer, token_ids=token_ids, pages=pages)
            self._receiver.pull(offer, pages[: self._pool.pages_for(len(token_ids))])

    def _renew(self, now_s: float) -> None:
        """Keep the leases of what waits for room, or for its turn to be sent."""
        waiting = [*self._offers, *(incoming.offer for incoming in self._incoming.values())]
        if waiting and now_s >= self._next_renewal_s:
            self._outbox += [(offer.source, KvRenew(lease_id=offer.lease_id)) for offer in waiting]
            self._next_renewal_s = now_s + min(offer.lease_s for offer in waiting) / 3

    def _evict(self, sequences: list[RunningSequence]) -> None:
        for sequence in sequences:
            request = sequence.request
            self._num_preemptions += 1
            reason = "preempted: an older sequence needed its pages"
            self._tell_evicted(request.request_id, sequence.choice, request.attempt, request.frontend, reason)

    def _abort(self, abort: Abort) -> None:
        def meant(request: PrefillRequest) -> bool:
            return request.request_id == abort.request_id and abort.attempt in (None, request.attempt)

        for sequence in self._batch.of(abort.request_id, abort.choice, abort.attempt):
            self._batch.remove(sequence)
        if self._migration is not None:
            self._migration.abort(abort)
        for incoming in self._incoming.values():
            if meant(incoming.offer.request):
                incoming.dropped.update(incoming.offer.request.choices if abort.choice is None else (abort.choice,))
        for offer in [offer for offer in self._offers if meant(offer.request)]:
            # One choice of several is dropped when it lands; its token events would tell, were it to run.
            if abort.choice is None or offer.request.choices == (abort.choice,):
                self._offers.remove(offer)
                self._acknowledge(offer)

    def _fail_running(self, reason: str, retryable: bool) -> None:
        for sequence in list(self._batch.running):
            self._batch.remove(sequence)
            self._tell_failed(sequence.request, sequence.choice, reason, retryable)

    def _acknowledge(self, offer: KvOffer) -> None:
        self._outbox.append((offer.source, KvAck(lease_id=offer.lease_id)))

    def _tell_evicted(self, request_id: RequestId, choice: int, attempt: int, to: WorkerId, reason: str) -> None:
        self._events[to].append(Evicted(request_id=request_id, choice=choice, attempt=attempt, reason=reason))

    def _tell_failed(self, request: PrefillRequest, choice: int, reason: str, retryable: bool) -> None:
        self._events[request.frontend].append(
            Failed(
                request_id=request.request_id,
                choice=choice,
                attempt=request.attempt,
                reason=reason,
                retryable=retryable,
            )
        )
