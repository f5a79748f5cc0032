"""The prefill engine on the embedded model, alone: its decode worker and frontend are played by the tests."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection
from typing import Any, TypeVar

import torch

from octet.config import PrefillConfig
from octet.errors import LaneError
from octet.ids import Epoch, RequestId, WorkerId
from octet.messages import (
    KvOffer,
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
from tests.unit.embedded import PAGE, Model

PREFILL, DECODE, FRONTEND = WorkerId("prefill-0"), WorkerId("decode-0"), WorkerId("frontend-0")
NUM_PAGES, LEASE_S, PATIENT_S = 16, 60.0, 20.0
LAST_LAYER = 3
T = TypeVar("T")

_random = torch.Generator()
_random.seed()
_numbers = itertools.count()


class Watched:
    """Routed experts that note how many rows they are asked for, and fail once when they are told to."""

    def __init__(self, inner: RoutedExperts) -> None:
        self._inner = inner
        self.rows: dict[int, list[int]] = defaultdict(list)
        """By layer, of each dispatch."""
        self._fault: tuple[int, LaneError] | None = None

    def fail_once(self, layer: int, error: LaneError) -> None:
        self._fault = layer, error

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Any:
        self.rows[layer].append(len(x_TH))
        if self._fault is not None and self._fault[0] == layer:
            error, self._fault = self._fault[1], None
            raise error
        return self._inner.dispatch(layer, x_TH)

    def combine(self, pending: Any) -> torch.Tensor:
        return self._inner.combine(pending)

    def settle(self) -> None:
        self._inner.settle()

    def drain(self) -> None:
        self._inner.drain()


class Prefill:
    """An engine, with what it said so far by kind."""

    def __init__(
        self,
        model: Model,
        *,
        num_pages: int = NUM_PAGES,
        chunk_tokens: int = 512,
        max_requests: int = 8,
        beside: Collection[WorkerId] = (),
        few_requests: int = 0,
    ):
        self.routed = Watched(model.routed)
        runner = model.runner(num_pages, num_pages * PAGE, self.routed)
        self.leases, self.channel = LeaseTable(LEASE_S), LocalChannel(PATIENT_S)
        self.sender = KvSender(runner.cache, self.leases, {DECODE: self.channel})
        config = PrefillConfig(chunk_tokens=chunk_tokens, max_requests=max_requests)
        self.engine = PrefillEngine(
            PREFILL, Epoch(3), runner, self.leases, self.sender, config, beside.__contains__, few_requests
        )
        self.page_bytes = runner.cache.page_bytes()
        self.now_s = 0.0
        self.said: list[tuple[WorkerId, Message]] = []

    @property
    def num_free(self) -> int:
        return self.engine.load().kv_pages_free

    def step(self) -> None:
        self.said += self.engine.step(self.now_s)

    def run(self, *requests: PrefillRequest) -> None:
        for request in requests:
            self.engine.handle(request)
        while self.engine.busy:
            self.step()

    def events(self, kind: type[T]) -> list[T]:
        reports = [message for _, message in self.said if isinstance(message, StepReport)]
        return [event for report in reports for event in report.events if isinstance(event, kind)]

    def tokens(self) -> dict[tuple[str, int], int]:
        return {(event.request_id, event.choice): event.token_id for event in self.events(TokenEvent)}

    def offers(self) -> list[KvOffer]:
        return [message for _, message in self.said if isinstance(message, KvOffer)]


def request(
    num_tokens: int = 6,
    *,
    name: str | None = None,
    choices: tuple[int, ...] = (0,),
    max_new_tokens: int = 10,
    priority: int = 0,
    arrival_s: float | None = None,
    sampling: Sampling | None = None,
    output: Output | None = None,
    stop_token_ids: tuple[int, ...] = (),
) -> PrefillRequest:
    number = next(_numbers)
    token_ids = torch.randint(0, 1000, (num_tokens,), generator=_random).tolist()
    return PrefillRequest(
        request_id=RequestId(name or f"r{number}"),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(token_ids),
        num_prompt_tokens=num_tokens,
        sampling=sampling or Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens, stop_token_ids=stop_token_ids),
        output=output or Output(),
        priority=priority,
        arrival_s=float(number) if arrival_s is None else arrival_s,
        decode_worker=DECODE,
        frontend=FRONTEND,
    )
