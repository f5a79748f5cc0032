from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from model.config import read_config
from model.kv_cache import KvCache
from octet.errors import PeerLostError
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import KvPull
from router import kv_sender
from router.kv_sender import KvSender
from router.leases import LeaseTable

DECODE = WorkerId("decode-0")
PATIENT_S = 20.0


class Channel:
    def __init__(self) -> None:
        self.sent: queue.Queue[torch.Tensor | None] = queue.Queue()
        self.begun, self.closed = threading.Event(), threading.Event()
        self.broken = False

    def send(self, pages: torch.Tensor | None) -> None:
        self.begun.set()
        if self.broken:
            raise PeerLostError("the other end is gone")
        self.sent.put(pages)

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        raise AssertionError("the sending end receives nothing")

    def close(self) -> None:
        self.closed.set()


class Unread(Channel):
    """Nobody reads at its other end, and its own end takes a while to notice that it was closed."""

    def send(self, pages: torch.Tensor | None) -> None:
        self.begun.set()
        assert self.closed.wait(PATIENT_S)
        time.sleep(0.2)
        raise PeerLostError("this end has given the wire up")


class Source:
    """Four leases, each of the page of its number, filled with it."""

    def __init__(self) -> None:
        self.cache = KvCache(read_config(EMBEDDED_MODEL), 4, 2, torch.float32, torch.device("cpu"))
        self.leases = LeaseTable(lease_s=60.0)
        for page in range(4):
            self.cache.import_pages([page], torch.full_like(self.cache.export_pages([page]), float(page)))
            self.leases.grant(LeaseId(str(page)), RequestId(str(page)), 0, (0,), [page], now_s=0.0)
        self.sender = KvSender(self.cache, self.leases, {})

    def pull(self, page: int, channel: int) -> None:
        self.sender.answer(KvPull(lease_id=LeaseId(str(page)), decode_worker=DECODE, channel=channel))

    def connect(self, channel: Channel, number: int = 0) -> threading.Thread:
        """Returns: the thread that sends over it."""
        before = set(threading.enumerate())
        self.sender.connect(DECODE, channel, number)
        (thread,) = set(threading.enumerate()) - before
        return thread


def taken(channel: Channel) -> float:
    """Which page came next."""
    pages = channel.sent.get(timeout=PATIENT_S)
    assert pages is not None
    return float(pages.max())


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    yield source
    source.sender.close(PATIENT_S)


def test_pulls_are_answered_in_their_order(source: Source) -> None:
    channel = Channel()
    source.sender.connect(DECODE, channel, number=5)
    for page in (2, 0, 3):
        source.pull(page, channel=5)
    assert [taken(channel) for _ in range(3)] == [2, 0, 3]


def test_what_is_awaited_on_a_channel_is_not_sent_on_the_one_that_takes_its_place(source: Source) -> None:
    before, after = Channel(), Channel()
    source.sender.connect(DECODE, before, number=5)
    source.sender.connect(DECODE, after, number=6)
    source.pull(1, channel=5)
    source.pull(2, channel=6)
    assert taken(after) == 2
    assert before.sent.empty()
    assert after.sent.empty()


def test_pulls_that_come_before_their_channel_are_answered_once_it_is_there(source: Source) -> None:
    source.pull(0, channel=5)
    source.pull(1, channel=6)
    source.pull(2, channel=6)
    channel = Channel()
    source.sender.connect(DECODE, channel, number=6)
    source.pull(3, channel=6)
    assert [taken(channel) for _ in range(3)] == [1, 2, 3]


def test_what_a_worker_that_is_gone_has_asked_for_is_forgotten(source: Source) -> None:
    source.pull(0, channel=5)
    source.sender.disconnect(DECODE)
    assert source.sender.peers == []
    channel = Channel()
    source.sender.connect(DECODE, channel, number=5)
    assert source.sender.peers == [DECODE]
    source.pull(1, channel=5)
    assert taken(channel) == 1


def test_a_lease_that_is_over_is_answered_with_nothing(source: Source) -> None:
    channel = Channel()
    source.sender.connect(DECODE, channel)
    source.sender.answer(KvPull(lease_id=LeaseId("gone"), decode_worker=DECODE, channel=0))
    assert channel.sent.get(timeout=PATIENT_S) is None


def test_pulls_for_a_channel_that_never_came_are_not_answered_on_another(source: Source) -> None:
    source.pull(0, channel=5)
    channel = Channel()
    source.sender.connect(DECODE, channel, number=6)
    source.pull(1, channel=6)
    assert taken(channel) == 1


def test_of_pulls_that_come_before_their_channel_the_last_are_kept(
    source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_sender, "_MOST_EARLY", 2)
    for page in range(4):
        source.pull(page, channel=5)
    channel = Channel()
    source.sender.connect(DECODE, channel, number=5)
    assert [taken(channel) for _ in range(2)] == [2, 3]


def test_a_channel_that_is_replaced_is_closed_and_leaves_no_thread_behind(source: Source) -> None:
    before = Channel()
    thread = source.connect(before, 5)
    source.sender.connect(DECODE, Channel(), number=6)
    assert before.closed.is_set()
    assert not thread.is_alive()


def test_nothing_is_sent_any_more_once_a_worker_is_disconnected(source: Source) -> None:
    channel = Unread()
    thread = source.connect(channel)
    source.pull(1, channel=0)
    assert channel.begun.wait(PATIENT_S)
    source.leases.acknowledge(LeaseId("1"))
    assert source.leases.reclaim(0.0) == []
    source.sender.disconnect(DECODE, PATIENT_S)
    assert not thread.is_alive()
    assert source.leases.reclaim(0.0) == [1]


def test_a_channel_that_breaks_is_told_of_and_nothing_more_is_sent_over_it(source: Source) -> None:
    channel = Channel()
    channel.broken = True
    thread = source.connect(channel)
    assert source.sender.severed == []
    source.pull(2, channel=0)
    assert channel.begun.wait(PATIENT_S)
    channel.broken = False
    source.pull(3, channel=0)
    thread.join(PATIENT_S)
    assert not thread.is_alive()
    assert source.sender.severed == [DECODE]
    assert channel.sent.empty()


def test_pages_that_could_not_be_sent_come_back_when_their_lease_ends(source: Source) -> None:
    channel = Channel()
    channel.broken = True
    thread = source.connect(channel)
    source.pull(2, channel=0)
    thread.join(PATIENT_S)
    assert source.leases.reclaim(59.9) == []
    assert sorted(source.leases.reclaim(60.0)) == [0, 1, 2, 3]


def test_another_channel_takes_the_place_of_one_that_broke(source: Source) -> None:
    broken, channel = Channel(), Channel()
    broken.broken = True
    thread = source.connect(broken, 5)
    source.pull(2, channel=5)
    thread.join(PATIENT_S)
    source.sender.connect(DECODE, channel, number=6)
    assert source.sender.severed == []
    source.pull(2, channel=6)
    assert taken(channel) == 2
