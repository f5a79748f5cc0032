from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from decode.handoff import Arrival, KvReceiver
from model import kv_cache
from model.config import read_config
from model.kv_cache import KvCache
from octet.errors import PeerLostError, UnavailableError
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import KvOffer, KvPull, PrefillRequest, pack_ids
from octet.request import Output, Sampling, Stopping

DECODE = WorkerId("decode-0")
PREFILLS = [WorkerId("prefill-0"), WorkerId("prefill-1")]
PATIENT_S = 20.0
NUM_PAGES = 8


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
    return KvOffer(lease_id=LeaseId(lease), source=prefill, request=request, next_tokens=(1,), lease_s=60.0)


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
        self.cache = KvCache(read_config(EMBEDDED_MODEL), NUM_PAGES, 2, torch.float32, torch.device("cpu"))
        self.receiver = KvReceiver(DECODE, self.cache, self.channels, self._ask, self.woken.release)

    def some_pages(self, count: int) -> torch.Tensor:
        """What a prefill worker would send."""
        return torch.randn(self.cache.export_pages(range(count)).shape)

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
    ends.receiver.pull(offer("a", PREFILLS[1]), [0])
    asked = ends.asked.get(timeout=PATIENT_S)
    assert asked == (PREFILLS[1], KvPull(lease_id=LeaseId("a"), decode_worker=DECODE, channel=0))


def test_pages_are_in_their_places_when_the_engine_is_woken(ends: Ends) -> None:
    sent = ends.some_pages(3)
    ends.receiver.pull(offer("a"), [5, 0, 2])
    ends.channels[PREFILLS[0]].answers.put(sent.flatten().view(torch.uint8))
    assert ends.arrival() == Arrival(LeaseId("a"))
    assert ends.cache.export_pages([5, 0, 2]).equal(sent)
    assert ends.channels[PREFILLS[0]].sizes == [sent.nbytes]


def test_many_pages_come_in_parts(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = ends.cache.page_bytes()
    monkeypatch.setattr(kv_cache, "_PART_BYTES", 2 * page_bytes + 1)
    sent = ends.some_pages(5)
    ends.receiver.pull(offer("a"), [7, 1, 3, 2, 6])
    for part in (sent[:, :, :2], sent[:, :, 2:4], sent[:, :, 4:]):
        ends.channels[PREFILLS[0]].answers.put(part.flatten().view(torch.uint8))
    assert ends.arrival() == Arrival(LeaseId("a"))
    assert ends.cache.export_pages([7, 1, 3, 2, 6]).equal(sent)
    assert ends.channels[PREFILLS[0]].sizes == [2 * page_bytes, 2 * page_bytes, page_bytes]


def test_a_channel_that_breaks_between_two_parts_is_an_arrival_with_the_reason(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "_PART_BYTES", ends.cache.page_bytes())
    ends.receiver.pull(offer("a"), [0, 1])
    ends.channels[PREFILLS[0]].answers.put(ends.some_pages(1).flatten().view(torch.uint8))
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("its process is gone"))
    assert "its process is gone" in ends.arrival().reason


def test_a_lease_that_is_over_is_an_arrival_with_the_reason(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), [0])
    ends.channels[PREFILLS[0]].answers.put(None)
    assert ends.arrival().reason == "its lease was over before the pages were taken"


def test_offers_are_asked_for_at_once_and_not_one_after_the_other(ends: Ends) -> None:
    for page, lease in enumerate("abc"):
        ends.receiver.pull(offer(lease), [page])
    asked = [ends.asked.get(timeout=PATIENT_S)[1].lease_id for _ in range(3)]
    assert asked == ["a", "b", "c"]


def test_a_pull_names_the_channel_on_which_it_is_awaited(ends: Ends) -> None:
    another = FakeChannel()
    ends.receiver.connect(PREFILLS[0], another, number=7)
    ends.receiver.pull(offer("a"), [0])
    assert ends.asked.get(timeout=PATIENT_S)[1].channel == 7


def test_pulls_from_one_worker_are_answered_in_order(ends: Ends) -> None:
    sent = [ends.some_pages(1) for _ in range(3)]
    for page, lease in enumerate("abc"):
        ends.receiver.pull(offer(lease), [page])
    arrivals = []
    for pages in sent:
        ends.channels[PREFILLS[0]].answers.put(pages.flatten().view(torch.uint8))
        arrivals.append(ends.arrival())
    assert [arrival.lease_id for arrival in arrivals] == ["a", "b", "c"]
    assert ends.cache.export_pages([0, 1, 2]).equal(torch.cat(sent, dim=2))


def test_a_silent_worker_delays_nobody_elses_pages(ends: Ends) -> None:
    ends.receiver.pull(offer("silent", PREFILLS[0]), [0])
    ends.receiver.pull(offer("a", PREFILLS[1]), [1])
    ends.channels[PREFILLS[1]].answers.put(ends.some_pages(1).flatten().view(torch.uint8))
    assert ends.arrival().lease_id == "a"


def test_a_broken_channel_is_an_arrival_with_the_reason(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), [0])
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("its process is gone"))
    arrival = ends.arrival()
    assert "prefill-0" in arrival.reason
    assert "its process is gone" in arrival.reason


def test_nothing_is_asked_of_a_worker_whose_channel_broke(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), [0])
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("gone"))
    ends.arrival()
    ends.asked.get(timeout=PATIENT_S)
    ends.receiver.pull(offer("b"), [0])
    assert "gone" in ends.arrival().reason
    assert ends.asked.qsize() == 0


def test_another_channel_takes_the_place_of_one_that_broke(ends: Ends) -> None:
    ends.receiver.pull(offer("a"), [0])
    ends.channels[PREFILLS[0]].answers.put(PeerLostError("gone"))
    ends.arrival()
    assert ends.receiver.severed == [PREFILLS[0]]
    another = FakeChannel()
    ends.receiver.connect(PREFILLS[0], another)
    assert ends.receiver.severed == []
    ends.receiver.pull(offer("b"), [0])
    another.answers.put(ends.some_pages(1).flatten().view(torch.uint8))
    assert ends.arrival() == Arrival(LeaseId("b"))


def test_a_worker_that_cannot_be_asked_is_an_arrival_with_the_reason(ends: Ends) -> None:
    ends.unreachable.add(PREFILLS[0])
    ends.receiver.pull(offer("a"), [0])
    assert "no such peer" in ends.arrival().reason


def test_an_offer_of_an_unknown_worker_is_an_arrival_with_the_reason(ends: Ends) -> None:
    ends.receiver.pull(offer("a", WorkerId("prefill-9")), [0])
    (arrival,) = ends.receiver.arrived()
    assert arrival.reason == "no channel to prefill-9"


def test_closing_ends_a_pull_that_waits() -> None:
    ends = Ends()
    ends.receiver.pull(offer("a"), [0])
    ends.asked.get(timeout=PATIENT_S)
    start_s = time.monotonic()
    ends.receiver.close(PATIENT_S)
    assert time.monotonic() - start_s < PATIENT_S / 2


def test_whoever_is_woken_finds_the_arrival() -> None:
    """An engine that looked too early would sleep on, with pages that have come."""
    ends, found = Ends(), queue.Queue[list[Arrival]]()
    receiver = KvReceiver(DECODE, ends.cache, ends.channels, ends._ask, lambda: found.put(receiver.arrived()))
    for number in range(4):
        receiver.pull(offer(str(number)), [number])
        ends.channels[PREFILLS[0]].answers.put(None if number % 2 else ends.some_pages(1).flatten().view(torch.uint8))
        assert [arrival.lease_id for arrival in found.get(timeout=PATIENT_S)] == [str(number)]
    receiver.close()
    ends.receiver.close()


def test_no_thread_is_left_behind_by_a_channel_that_another_one_replaced() -> None:
    ends = Ends()
    threads = [thread for thread in threading.enumerate() if thread.name == f"kv-from-{PREFILLS[0]}"]
    ends.receiver.connect(PREFILLS[0], FakeChannel(), 1)
    assert len(threads) == 1
    assert not threads[0].is_alive()
    ends.receiver.close()
    assert not any(thread.name.startswith("kv-from-") for thread in threading.enumerate())
