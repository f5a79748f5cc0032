"""A frontend and its clients, with workers that are real mailboxes, played by the tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import pytest

from cluster.frontend.frontend import Frontend
from cluster.frontend.record import Increment, Reader
from cluster.frontend.validation import parse_request
from cluster.plan import ServingPlan
from cluster.planning import EMBEDDED_MODEL, make_plan
from model.tokenizer import Tokenizer
from octet.config import load_config
from octet.ids import Epoch, RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import (
    Abort,
    Evicted,
    Failed,
    Message,
    PrefillRequest,
    StepReport,
    TokenEvent,
    WorkerLoad,
)
from octet.request import FinishReason
from octet.v1 import octet_pb2 as pb

HOST, PATIENT_S = "127.0.0.1", 20.0
FRONTEND, PREFILL, DECODE = WorkerId("frontend-0"), WorkerId("prefill-0"), WorkerId("decode-0")
MAX_REQUESTS = 3
LOAD = WorkerLoad(kv_pages_total=64, kv_pages_free=64, running=0, waiting=0, tokens=0)
PROMPT = [7, 8, 9]
PLAN = make_plan(load_config(None, [f"frontend.max_requests={MAX_REQUESTS}"]))
TOKENIZER = Tokenizer.open(EMBEDDED_MODEL)
T = TypeVar("T")


async def soon(awaited: Coroutine[Any, Any, T] | asyncio.Task[T]) -> T:
    return await asyncio.wait_for(awaited, PATIENT_S)


class Worker:
    """A worker's mailbox."""

    def __init__(self, worker_id: WorkerId, frontend: Frontend) -> None:
        self.worker_id, self.mailbox = worker_id, AsyncMailbox(HOST, PLAN.secret)
        self.mailbox.connect({FRONTEND: frontend.address})

    async def next(self) -> Message:
        return await soon(self.mailbox.receive())

    async def next_request(self) -> PrefillRequest:
        while not isinstance(message := await self.next(), PrefillRequest):
            assert isinstance(message, Abort)
        return message

    def tell(self, *events: TokenEvent | Evicted | Failed) -> None:
        self.mailbox.send(
            FRONTEND, StepReport(worker_id=self.worker_id, epoch=Epoch(1), events=tuple(events), load=LOAD)
        )


class Client:
    """One reader's increments, as they come."""

    def __init__(self, opening: AbstractContextManager[Reader]) -> None:
        self.increments: list[Increment] = []
        self._heard = asyncio.Condition()
        self.task = asyncio.create_task(self._collect(opening))

    async def _collect(self, opening: AbstractContextManager[Reader]) -> None:
        with opening as reader:
            async for increment in reader.increments():
                async with self._heard:
                    self.increments.append(increment)
                    self._heard.notify_all()

    async def heard(self, num_tokens: int) -> None:
        """Until that many tokens have come."""
        async with self._heard:
            await soon(self._heard.wait_for(lambda: len(self.tokens()) >= num_tokens))

    async def end(self) -> Client:
        await soon(self.task)
        return self

    async def leave(self) -> None:
        self.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await self.task

    def tokens(self, choice: int = 0) -> list[int]:
        pieces = [increment.piece for increment in self.increments if increment.piece.choice == choice]
        return [token_id for piece in pieces for token_id in piece.token_ids]

    def text(self) -> str:
        return "".join(increment.piece.text for increment in self.increments)

    def finish_reasons(self) -> list[FinishReason]:
        return [i.piece.finish_reason for i in self.increments if i.piece.finish_reason is not None]


@dataclasses.dataclass(frozen=True)
class Cluster:
    frontend: Frontend
    prefill: Worker
    decode: Worker
    others: list[Worker] = dataclasses.field(default_factory=list)

    def new_worker(self, worker_id: str) -> Worker:
        """Not one of the frontend's before `set_workers`."""
        self.others.append(Worker(WorkerId(worker_id), self.frontend))
        return self.others[-1]

    def set_workers(
        self, prefill: Collection[Worker], decode: Collection[Worker], draining: Collection[Worker] = ()
    ) -> None:
        self.frontend.set_workers(
            {worker.worker_id: worker.mailbox.address for worker in prefill},
            {worker.worker_id: worker.mailbox.address for worker in decode},
            [worker.worker_id for worker in draining],
        )

    def ask(
        self,
        *,
        request_id: str = "r",
        n: int = 1,
        stop: tuple[str, ...] = (),
        priority: int = 0,
        resumable: bool = False,
        received: Sequence[Sequence[int]] = (),
        timeout_s: float | None = None,
        stream_interval: int | None = None,
        whole: bool = False,
    ) -> Client:
        return self.send(
            pb.GenerateRequest(
                request_id=request_id,
                priority=priority,
                resumable=resumable,
                received=[pb.TokenIds(ids=token_ids) for token_ids in received],
                token_ids=pb.TokenIds(ids=PROMPT),
                sampling=pb.Sampling(n=n),
                stopping=pb.Stopping(max_new_tokens=50, stop=stop),
                output=pb.Output(stream_interval=stream_interval),
            ),
            timeout_s,
            whole=whole,
        )

    def send(self, message: pb.GenerateRequest, timeout_s: float | None = None, *, whole: bool = False) -> Client:
        spec = parse_request(message, self.frontend.limits, self.frontend.tokenizer)
        return Client(self.frontend.generate(spec, timeout_s, whole=whole))

    def resume(self, *offsets: int, request_id: str = "r", timeout_s: float | None = None) -> Client:
        return Client(self.frontend.resume(RequestId(request_id), offsets, timeout_s))

    async def admitted(self, **fields: Any) -> tuple[Client, PrefillRequest]:
        client = self.ask(**fields)
        return client, await self.prefill.next_request()

    def outcomes(self) -> tuple[int, int, int]:
        totals = self.frontend.totals
        return totals.finished, totals.failed, totals.cancelled


@contextlib.asynccontextmanager
async def playing(plan: ServingPlan = PLAN) -> AsyncIterator[Cluster]:
    """A frontend that serves with one prefill and one decode worker."""
    frontend = Frontend(FRONTEND, plan, TOKENIZER, AsyncMailbox(HOST, PLAN.secret))
    cluster = Cluster(frontend, Worker(PREFILL, frontend), Worker(DECODE, frontend))
    frontend.serve({PREFILL: cluster.prefill.mailbox.address}, {DECODE: cluster.decode.mailbox.address})
    try:
        yield cluster
    finally:
        frontend.close()
        for worker in (cluster.prefill, cluster.decode, *cluster.others):
            worker.mailbox.close()


def token(
    request: PrefillRequest,
    index: int,
    token_id: int,
    finish_reason: FinishReason | None = None,
    *,
    choice: int = 0,
    attempt: int | None = None,
) -> TokenEvent:
    return TokenEvent(
        request_id=request.request_id,
        choice=choice,
        attempt=request.attempt if attempt is None else attempt,
        index=index,
        token_id=token_id,
        finish_reason=finish_reason,
    )


def evicted(request: PrefillRequest, choice: int = 0) -> Evicted:
    return Evicted(request_id=request.request_id, choice=choice, attempt=request.attempt, reason="preempted")


def failed(request: PrefillRequest, reason: str, *, choice: int = 0, retryable: bool = False) -> Failed:
    return Failed(
        request_id=request.request_id, choice=choice, attempt=request.attempt, reason=reason, retryable=retryable
    )


def abort(request: PrefillRequest, choice: int | None = None) -> Abort:
    return Abort(request_id=request.request_id, choice=choice, attempt=request.attempt)
