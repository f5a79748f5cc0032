from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from decode.handoff import Arrival, KvReceiver
from octet.errors import PeerLostError, UnavailableError
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import KvOffer, KvPull, PrefillRequest, pack_ids
from octet.request import Output, Sampling, Stopping

DECODE = WorkerId("decode-0")
PREFILLS = [WorkerId("prefill-0"), WorkerId("prefill-1")]
PATIENT_S = 20.0


def offer(lease: str, prefill: WorkerId = PREFILLS[0]) -> KvOffer:
    request = PrefillRequest(
        request_id=RequestId(lease),
        attempt=0,
        choices=(0,),
        token_ids=pack_ids([1]),
        num_prompt_tokens=1,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=2),
        output=Output(),
        priority=0,
        arrival_s=0.0,
        decode_worker=DECODE,
        frontend=WorkerId("frontend-0"),
    )
    return KvOffer(lease_id=LeaseId(lease), prefill_worker=prefill, request=request, next_tokens=(1,))


class FakeChannel:
    """A channel whose other end is the test."""

    def __init__(self) -> None:
        self.answers: queue.Queue[torch.Tensor | Exception | None] = queue.Queue()
        self.sizes: list[int] = []

    def send(self, pages: torch.Tensor | None) -> None:
        raise AssertionError("a decode worker sends no pages")

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        self.sizes.append(payload_bytes)
        answer = self.answers.get(timeout=PATIENT_S)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.answers.put(PeerLostError("closed"))


class Ends:
    def __init__(self) -> None:
        self.channels = {prefill: FakeChannel() for prefill in PREFILLS}
        self.asked: queue.Queue[tuple[WorkerId, KvPull]] = queue.Queue()
        self.woken = threading.Semaphore(0)
        self.unreachable: set[WorkerId] = set()
        self.receiver = KvReceiver(DECODE, self.channels, self._ask, self.woken.release)

    def _ask(self, to: WorkerId, pull: KvPull) -> None:
        if to in self.unreachable:
            raise UnavailableError(f"no such peer: {to}")
        self.asked.put((to, pull))

    def arrival(self) -> Arrival:
        assert self.woken.acquire(timeout=PATIENT_S)
        (arrival,) = self.receiver.arrived()
        return arrival


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.receiver.close(PATIENT_S)


def test_a_pull_asks_the_prefill_worker_that_offered(ends: Ends) -> None:
    ends.receiver.pull(offer("a", PREFILLS[1]), 8)
    asked = ends.asked.get(timeout=PATIENT_S)
    assert asked == (PREFILLS[1], KvPull(lease_id=LeaseId("a"), decode_worker=DECODE))


def test_pages_that_arrive_wake_the_engine(ends: Ends) -> None:
    pages = torch.arange(8, dtype=torch.uint8)
    ends.receiver.pull(offer("a"), 8)
    ends.channels[PREFILLS[0]].answers.put(pages)
    arrival = ends.arrival()
    assert (arrival.lease_id, arrival.pages, arrival.reason) == ("a", pages, "")
    assert ends.channels[PREFILLS[0]].sizes == [8]


def test_pages_of_a_lease_that_is_over_arrive_as_none_with_a_reason(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), 8)
    ends.channels[PREFILLS[0]].answers.put(None)
    arrival = ends.arrival()
    assert (arrival.pages, arrival.reason) == (None, "its lease was over before the pages were taken")


def test_pulls_from_one_worker_are_answered_in_order(ends: Ends) -> None:
    for lease in "abc":
        ends.receiver.pull(offer(lease), 1)
    arrivals = []
    for number in range(3):
        ends.channels[PREFILLS[0]].answers.put(torch.full((1,), number, dtype=torch.uint8))
        arrivals.append(ends.arrival())
    assert [(a.lease_id, a.pages.item()) for a in arrivals if a.pages is not None] == [("a", 0), ("b", 1), ("c", 2)]


def test_a_silent_worker_delays_nobody_elses_pages(ends: Ends) -> None:
    ends.receiver.pull(offer("silent", PREFILLS[0]), 1)
    ends.receiver.pull(offer("a", PREFILLS[1]), 1)
    ends.channels[PREFILLS[1]].answers.put(torch.zeros(1, dtype=torch.uint8))
    assert ends.arrival().lease_id == "a"


def test_a_broken_channel_is_an_arrival_without_pages(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), 1)
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("its process is gone"))
    arrival = ends.arrival()
    assert arrival.pages is None
    assert "prefill-0" in arrival.reason
    assert "its process is gone" in arrival.reason


def test_nothing_is_asked_of_a_worker_whose_channel_broke(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), 1)
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("gone"))
    ends.arrival()
    ends.asked.get(timeout=PATIENT_S)
    ends.receiver.pull(offer("b"), 1)
    assert (ends.arrival().pages, ends.asked.qsize()) == (None, 0)


def test_a_worker_that_cannot_be_asked_is_an_arrival_without_pages(ends: Ends) -> None:
    ends.unreachable.add(PREFILLS[0])
    ends.receiver.pull(offer("a"), 1)
    assert "no such peer" in ends.arrival().reason


def test_an_offer_of_an_unknown_worker_is_an_arrival_without_pages(ends: Ends) -> None:
    ends.receiver.pull(offer("a", WorkerId("prefill-9")), 1)
    (arrival,) = ends.receiver.arrived()
    assert (arrival.pages, arrival.reason) == (None, "no channel to prefill-9")


def test_closing_ends_a_pull_that_waits() -> None:
    ends = Ends()
    ends.receiver.pull(offer("a"), 1)
    ends.asked.get(timeout=PATIENT_S)
    start_s = time.monotonic()
    ends.receiver.close(PATIENT_S)
    assert time.monotonic() - start_s < PATIENT_S / 2
