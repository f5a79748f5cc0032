"""The live requests of a frontend: where each of them is, and the events that wait for it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping

from cluster.journal import Journal
from cluster.scheduler import Assignment, DecodeView, PrefillView
from octet.ids import RequestId, WorkerId
from octet.messages import Evicted, Failed, TokenEvent, WorkerLoad

Event = TokenEvent | Evicted | Failed


@dataclasses.dataclass(frozen=True, slots=True)
class Aborted:
    """By the client's Abort, or at the end of a drain."""


@dataclasses.dataclass(slots=True)
class _Stage:
    """One choice's way: still in its prefill worker, or on to its decode worker."""

    prefill: WorkerId
    decode: WorkerId
    queued_tokens: int
    pages: int
    prefilled: bool = False


@dataclasses.dataclass(slots=True)
class LiveRequest:
    journal: Journal
    events: asyncio.Queue[Event | Aborted] = dataclasses.field(default_factory=asyncio.Queue)
    stages: dict[int, _Stage] = dataclasses.field(default_factory=dict)

    @property
    def request_id(self) -> RequestId:
        return self.journal.request.request_id


class LiveRequests:
    """Who is live, and what they keep of each worker: what the scheduler decides by."""

    def __init__(self, prefill: list[WorkerId], decode: list[WorkerId], page_size: int) -> None:
        self._requests: dict[RequestId, LiveRequest] = {}
        self._prefill, self._decode, self._page_size = prefill, decode, page_size
        self.loads: dict[WorkerId, WorkerLoad] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def all(self) -> list[LiveRequest]:
        return list(self._requests.values())

    def get(self, request_id: RequestId) -> LiveRequest | None:
        return self._requests.get(request_id)

    def add(self, journal: Journal) -> LiveRequest:
        live = LiveRequest(journal)
        self._requests[live.request_id] = live
        return live

    def remove(self, live: LiveRequest) -> None:
        del self._requests[live.request_id]

    def assign(
        self, live: LiveRequest, choices: tuple[int, ...], num_tokens: int, num_cached: int, assignment: Assignment
    ) -> None:
        """Note where choices are computed. The first of them carries the prompt's share of work and pages."""
        pages = -(-num_tokens // self._page_size)
        for number, choice in enumerate(choices):
            live.stages[choice] = _Stage(
                prefill=assignment.prefill,
                decode=assignment.decode,
                queued_tokens=num_tokens - num_cached if number == 0 else 0,
                pages=pages if number == 0 else 1,
            )

    def note_token(self, live: LiveRequest, event: TokenEvent) -> None:
        """A token came: the first, that the choice's prompt is computed; another, that its pages count as in use."""
        stage = live.stages.get(event.choice)
        if stage is not None:
            stage.queued_tokens = 0
            if stage.prefilled:
                stage.pages = 0
            stage.prefilled = True

    def prefill_views(self, cached_tokens: Mapping[WorkerId, int]) -> list[PrefillView]:
        """
        Args:
            cached_tokens: for every worker, what it probably has of the request at hand.
        """
        queued = dict.fromkeys(self._prefill, 0)
        for live in self._requests.values():
            for stage in live.stages.values():
                queued[stage.prefill] += stage.queued_tokens
        return [
            PrefillView(worker_id=worker_id, queued_tokens=tokens, cached_tokens=cached_tokens.get(worker_id, 0))
            for worker_id, tokens in queued.items()
        ]

    def decode_views(self) -> list[DecodeView]:
        promised = dict.fromkeys(self._decode, 0)
        sequences = dict.fromkeys(self._decode, 0)
        for live in self._requests.values():
            for stage in live.stages.values():
                promised[stage.decode] += stage.pages
                sequences[stage.decode] += 1
        return [
            DecodeView(
                worker_id=worker_id,
                free_pages=self.loads[worker_id].kv_pages_free if worker_id in self.loads else 0,
                promised_pages=promised[worker_id],
                live_sequences=sequences[worker_id],
            )
            for worker_id in self._decode
        ]
