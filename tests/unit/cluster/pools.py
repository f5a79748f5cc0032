"""Prefill and decode workers without sockets or arithmetic, in which everything happens when a test says so."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import defaultdict, deque
from collections.abc import Collection, Coroutine, Mapping
from typing import Any

from octet.errors import UnavailableError
from octet.ids import Epoch, RequestId, WorkerId
from octet.messages import Abort, Evicted, Failed, Message, PrefillRequest, StepReport, TokenEvent, WorkerLoad

LOAD = WorkerLoad(kv_pages_total=64, kv_pages_free=64, running=0, waiting=0, tokens=0)


def token_of(request: str | int, choice: int, index: int) -> int:
    """A token is a function of the request, by its id or its seed, and its position."""
    return 100 + (hash((request, choice)) + 7 * index) % 800


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        super().__init__()

    def time(self) -> float:
        return self.now_s

    def do(self, action: Coroutine[Any, Any, None]) -> None:
        """Then let everything run that can."""

        async def act() -> None:
            await action
            for _ in range(10):
                await asyncio.sleep(0)

        self.run_until_complete(act())


@dataclasses.dataclass(slots=True)
class Sequence:
    """One choice in a decode worker."""

    request: PrefillRequest
    choice: int
    num_tokens: int


@dataclasses.dataclass
class Worker:
    """A prefill worker has prompts, a decode worker has sequences."""

    worker_id: WorkerId
    prompts: list[PrefillRequest] = dataclasses.field(default_factory=list)
    sequences: list[Sequence] = dataclasses.field(default_factory=list)

    def take(self, message: Message) -> None:
        match message:
            case PrefillRequest():
                self.prompts.append(message)
            case Abort():
                self._forget(message)

    def _forget(self, abort: Abort) -> None:
        def meant(request: PrefillRequest) -> bool:
            return request.request_id == abort.request_id and abort.attempt in (None, request.attempt)

        self.prompts = [
            r for r in self.prompts if not (meant(r) and (abort.choice is None or r.choices == (abort.choice,)))
        ]
        self.sequences = [s for s in self.sequences if not (meant(s.request) and abort.choice in (None, s.choice))]


class Pools:
    """What the frontend's mailbox is connected to. Killed workers say what is on its way, and nothing more."""

    def __init__(self, *, seeded: bool = False) -> None:
        """
        Args:
            seeded: tokens depend on the request's seed, not on its id.
        """
        self._seeded = seeded
        self.prefill: dict[WorkerId, Worker] = {}
        self.decode: dict[WorkerId, Worker] = {}
        self.reports: dict[WorkerId, deque[StepReport]] = defaultdict(deque)
        self._offers: dict[WorkerId, deque[tuple[PrefillRequest, tuple[int, ...]]]] = defaultdict(deque)

    def worker(self, worker_id: WorkerId) -> Worker | None:
        return self.prefill.get(worker_id) or self.decode.get(worker_id)

    def step_prefill(self, worker: Worker) -> None:
        """Compute the first prompt: first tokens are told, pages are offered."""
        if not worker.prompts:
            return
        request = worker.prompts.pop(0)
        index = request.num_tokens - request.num_prompt_tokens
        events = [self._token(request, choice, index) for choice in request.choices]
        going_on = tuple(event.choice for event in events if event.finish_reason is None)
        self._tell(worker, *events)
        if going_on:
            self._offers[request.decode_worker].append((request, going_on))

    def step_decode(self, worker: Worker, max_batch: int = 10**6) -> None:
        """Take the offers that wait, as far as there is room, and advance every sequence by a token."""
        offers = self._offers[worker.worker_id]
        while offers and len(worker.sequences) < max_batch:
            request, choices = offers.popleft()
            index = request.num_tokens - request.num_prompt_tokens
            worker.sequences += [Sequence(request, choice, index + 1) for choice in choices]
        events = []
        for sequence in worker.sequences:
            events.append(self._token(sequence.request, sequence.choice, sequence.num_tokens))
            sequence.num_tokens += 1
        worker.sequences = [s for s, event in zip(worker.sequences, events, strict=True) if not event.finish_reason]
        self._tell(worker, *events)

    def fail(self, worker: Worker) -> None:
        """Everything here, for a passing reason."""
        lost = [(request, choice) for request in worker.prompts for choice in request.choices]
        lost += [(sequence.request, sequence.choice) for sequence in worker.sequences]
        worker.prompts, worker.sequences = [], []
        self._tell(
            worker,
            *(
                Failed(request_id=r.request_id, choice=choice, attempt=r.attempt, reason="broken", retryable=True)
                for r, choice in lost
            ),
        )

    def evict(self, worker: Worker) -> None:
        if worker.sequences:
            sequence = worker.sequences.pop()
            request = sequence.request
            self._tell(
                worker,
                Evicted(
                    request_id=request.request_id, choice=sequence.choice, attempt=request.attempt, reason="preempted"
                ),
            )

    def migrate(self, source: Worker, target: Worker) -> None:
        # They may be the same.
        moved, source.sequences = source.sequences, []
        target.sequences += moved

    def _tell(self, worker: Worker, *events: TokenEvent | Evicted | Failed) -> None:
        if events:
            self.reports[worker.worker_id].append(
                StepReport(worker_id=worker.worker_id, epoch=Epoch(1), events=events, load=LOAD)
            )

    def _token(self, request: PrefillRequest, choice: int, index: int) -> TokenEvent:
        return TokenEvent(
            request_id=RequestId(request.request_id),
            choice=choice,
            attempt=request.attempt,
            index=index,
            token_id=token_of(request.sampling.seed if self._seeded else request.request_id, choice, index),
            finish_reason="length" if index + 1 == request.stopping.max_new_tokens else None,
        )


class PoolsMailbox:
    """A frontend's mailbox: what is sent is there at once, what is received comes when the test delivers it."""

    address = "nowhere"

    def __init__(self, pools: Pools) -> None:
        self._pools, self._peers = pools, set[WorkerId]()
        self.inbound: asyncio.Queue[StepReport] = asyncio.Queue()

    def connect(self, peers: Mapping[WorkerId, str]) -> None:
        self._peers |= peers.keys()

    def disconnect(self, peers: Collection[WorkerId]) -> None:
        self._peers -= set(peers)

    def send(self, to: WorkerId, message: Message) -> None:
        if to not in self._peers:
            raise UnavailableError(f"no such peer: {to}")
        worker = self._pools.worker(to)
        if worker is not None:
            worker.take(message)

    async def receive(self) -> StepReport:
        return await self.inbound.get()

    def close(self) -> None: ...
