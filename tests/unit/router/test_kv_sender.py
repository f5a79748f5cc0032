from __future__ import annotations

import queue
from collections.abc import Iterator

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from model.config import read_config
from model.kv_cache import KvCache
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import KvPull
from router.kv_sender import KvSender
from router.leases import LeaseTable

DECODE = WorkerId("decode-0")
PATIENT_S = 20.0


class Channel:
    def __init__(self) -> None:
        self.sent: queue.Queue[torch.Tensor | None] = queue.Queue()

    def send(self, pages: torch.Tensor | None) -> None:
        self.sent.put(pages)

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        raise AssertionError("the sending end receives nothing")

    def close(self) -> None:
        return


class Source:
    """Four leases, each of the page of its number, filled with it."""

    def __init__(self) -> None:
        self.cache = KvCache(read_config(EMBEDDED_MODEL), 4, 2, torch.float32, torch.device("cpu"))
        leases = LeaseTable(lease_s=60.0)
        for page in range(4):
            self.cache.import_pages([page], torch.full_like(self.cache.export_pages([page]), float(page)))
            leases.grant(LeaseId(str(page)), RequestId(str(page)), 0, (0,), [page], now_s=0.0)
        self.sender = KvSender(self.cache, leases, {})

    def pull(self, page: int, channel: int) -> None:
        self.sender.answer(KvPull(lease_id=LeaseId(str(page)), decode_worker=DECODE, channel=channel))


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
