"""A decode engine on the embedded model, behind a real prefill engine; the test carries the messages."""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from cluster.frontend.journal import Journal
from decode.engine import DecodeEngine
from decode.handoff import KvReceiver
from decode.migration import Migration
from octet.config import DecodeConfig, PrefillConfig
from octet.errors import LaneError
from octet.ids import Epoch, RequestId, WorkerId
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
    pack_ids,
)
from octet.request import Output, Sampling, Stopping
from prefill.engine import PrefillEngine
from router.channel import LocalChannel
from router.kv_sender import KvSender
from router.leases import LeaseTable
from router.routed_experts import RoutedExperts
from tests.unit.embedded import Model

PREFILL, DECODE, FRONTEND = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("frontend-0")
NUM_PAGES, LEASE_S, PATIENT_S, CONTEXT = 32, 60.0, 20.0, 256
LONG = 24
"""New tokens of requests that are to run together: the pages of one may come some steps after another's."""
T = TypeVar("T")

RANDOM = torch.Generator()
RANDOM.seed()
_numbers = itertools.count()


class Faulty:
    """Routed experts that fail once, when and where they are told to."""

    def __init__(self, inner: RoutedExperts) -> None:
        self._inner = inner
        self._fault: tuple[int, LaneError] | None = None

    def fail_once(self, layer: int, error: LaneError) -> None:
        self._fault = layer, error

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Any:
        return layer, self._inner.dispatch(layer, x_TH)

    def combine(self, pending: Any) -> torch.Tensor:
        layer, dispatched = pending
        if self._fault is not None and self._fault[0] == layer:
            error, self._fault = self._fault[1], None
            raise error
        return self._inner.combine(dispatched)

    def settle(self) -> None:
        self._inner.settle()

    def drain(self) -> None:
        self._inner.drain()


class Pair:
    """A prefill and a decode engine. Messages arrive at once, except pulls while they are held."""

    def __init__(self, model: Model, num_pages: int = NUM_PAGES, max_batch: int = 16, chunk_tokens: int = 512) -> None:
        """On the same cores."""
        self.routed = Faulty(model.routed)
        self._channel, leases = LocalChannel(PATIENT_S), LeaseTable(LEASE_S)
        prefill_runner = model.runner(64, CONTEXT, model.routed)
        self.sender = KvSender(prefill_runner.cache, leases, {DECODE: self._channel})
        self.prefill = PrefillEngine(
            PREFILL,
            Epoch(1),
            prefill_runner,
            leases,
            self.sender,
            PrefillConfig(chunk_tokens=chunk_tokens),
            is_beside=lambda worker_id: worker_id == DECODE,
        )
        self._arrived = threading.Event()
        runner = model.runner(num_pages, CONTEXT, self.routed)
        self.receiver = KvReceiver(DECODE, runner.cache, {PREFILL: self._channel}, self._ask, self._arrived.set)
        moved = LeaseTable(LEASE_S)
        migration = Migration(DECODE, moved, KvSender(runner.cache, moved, {}))
        config = DecodeConfig(max_batch=max_batch)
        self.decode = DecodeEngine(DECODE, Epoch(1), runner, self.receiver, config, migration=migration)
        self.held: queue.Queue[KvPull] | None = None
        self.journals: dict[str, Journal] = {}
        self.events: list[TokenEvent | Evicted | Failed] = []
        self.acks: list[KvAck] = []
        self.now_s = 0.0

    @property
    def num_free(self) -> tuple[int, int]:
        return self.prefill.load().kv_pages_free, self.decode.load().kv_pages_free

    def submit(self, *requests: PrefillRequest) -> None:
        for request in requests:
            self.journals[request.request_id] = Journal(request)
            self.prefill.handle(request)

    def step_prefill(self) -> None:
        self.deliver(self.prefill.step(self.now_s))

    def step_decode(self) -> None:
        self._arrived.clear()
        self.deliver(self.decode.step(self.now_s))

    def step(self) -> None:
        self.step_prefill()
        self.step_decode()

    def until(self, happened: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENT_S
        while not happened():
            assert time.monotonic() < until_s, "it did not happen"
            self.step()
            if not self.prefill.busy and not self.decode.busy:
                self._arrived.wait(0.02)

    def until_running(self, count: int = 1) -> None:
        self.until(lambda: self.decode.load().running == count)

    def until_free(self) -> None:
        """Pages that were sent come back when the sender's thread has noted the end, maybe after their arrival."""
        self.until(lambda: self.num_free == ALL_FREE)

    def run(self, *requests: PrefillRequest) -> None:
        self.submit(*requests)
        self.until(lambda: all(journal.ended for journal in self.journals.values()))

    def wait_for_arrival(self) -> None:
        assert self._arrived.wait(PATIENT_S)

    def hold_pulls(self) -> None:
        self.held = queue.Queue()

    def release_pull(self) -> None:
        assert self.held is not None
        self.prefill.handle(self.held.get(timeout=PATIENT_S))

    def abort(self, request: PrefillRequest, choice: int | None = None) -> None:
        for engine in (self.prefill, self.decode):
            engine.handle(Abort(request_id=request.request_id, choice=choice))

    def of(self, kind: type[T]) -> list[T]:
        return [event for event in self.events if isinstance(event, kind)]

    def tokens(self) -> dict[tuple[str, int], list[int]]:
        return {
            (name, choice): journal.token_ids(choice)
            for name, journal in self.journals.items()
            for choice in journal.request.choices
        }

    def close(self) -> None:
        self.receiver.close()
        self.sender.close()

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        if self.held is None:
            self.prefill.handle(pull)
        else:
            self.held.put(pull)

    def deliver(self, outgoing: list[tuple[WorkerId, Message]]) -> None:
        for _, message in outgoing:
            if isinstance(message, KvOffer):
                self.decode.handle(message)
            elif isinstance(message, StepReport):
                for event in message.events:
                    self._hear(event)
            else:
                assert isinstance(message, KvAck | KvRenew)
                self.acks += [message] if isinstance(message, KvAck) else []
                self.prefill.handle(message)

    def _hear(self, event: TokenEvent | Evicted | Failed) -> None:
        self.events.append(event)
        journal = self.journals[event.request_id]
        if isinstance(event, TokenEvent):
            assert journal.commit(event)
            if event.finish_reason is not None:
                journal.end(event.choice)
        elif isinstance(event, Evicted):
            again = journal.restart(event)
            assert again is not None
            self.prefill.handle(again)
        else:
            journal.end(event.choice)


def request(
    num_tokens: int = 6,
    *,
    max_new_tokens: int = 8,
    choices: tuple[int, ...] = (0,),
    sampling: Sampling | None = None,
    output: Output | None = None,
) -> PrefillRequest:
    number = next(_numbers)
    token_ids = torch.randint(0, 1000, (num_tokens,), generator=RANDOM).tolist()
    return PrefillRequest(
        request_id=RequestId(f"r{number}"),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(token_ids),
        num_prompt_tokens=num_tokens,
        sampling=sampling or Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens),
        output=output or Output(),
        priority=0,
        arrival_s=float(number),
        decode_worker=DECODE,
        frontend=FRONTEND,
    )


def alone(pairs: Callable[..., Pair], *requests: PrefillRequest) -> dict[tuple[str, int], list[int]]:
    """What each request gets when nobody else is there and nothing goes wrong."""
    tokens: dict[tuple[str, int], list[int]] = {}
    for each in requests:
        undisturbed = pairs(num_pages=64)
        undisturbed.run(each)
        tokens |= undisturbed.tokens()
    return tokens


ALL_FREE = (64, NUM_PAGES)
