from __future__ import annotations

import pathlib
import random

import pytest
import torch

from decode.batch import RunningSequence
from decode.migration import Migration
from model.config import read_config
from model.kv_cache import KvCache
from octet.ids import RequestId, WorkerId
from octet.messages import Abort, KvAck, KvPull, KvRenew, PrefillRequest, pack_ids, unpack_ids
from octet.request import Output, Sampling, Stopping
from router.channel import LocalChannel
from router.kv_sender import KvSender
from router.leases import LeaseTable

EMBEDDED_MODEL = pathlib.Path(__file__).parents[3] / "model" / "embedded"
HEIRS = [WorkerId("decode-1"), WorkerId("decode-2")]


@pytest.fixture
def migration() -> Migration:
    cache = KvCache(read_config(EMBEDDED_MODEL), 8, 4, torch.float32, torch.device("cpu"))
    leases = LeaseTable(lease_s=10.0)
    return Migration(WorkerId("decode-0"), leases, KvSender(cache, leases, {}))


def sequence(num_prompt: int, num_new: int, pages: list[int]) -> RunningSequence:
    token_ids = [random.randrange(100) for _ in range(num_prompt + num_new)]
    request = PrefillRequest(
        request_id=RequestId("a"),
        attempt=3,
        choices=(0, 1),
        token_ids=pack_ids(token_ids[:num_prompt]),
        num_prompt_tokens=num_prompt,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=50),
        output=Output(),
        priority=0,
        arrival_s=0.0,
        decode_worker=WorkerId("decode-0"),
        frontend=WorkerId("frontend-0"),
    )
    return RunningSequence(request=request, choice=1, token_ids=token_ids, pages=pages)


def test_an_offer_has_all_tokens_but_the_last_which_comes_next(migration: Migration) -> None:
    given = sequence(5, 3, [0, 1])
    target, offer = migration.offer(given, HEIRS, now_s=0.0)
    assert unpack_ids(offer.request.token_ids) == given.token_ids[:-1]
    assert offer.next_tokens == (given.token_ids[-1],)
    assert (offer.request.choices, offer.request.attempt, offer.request.num_prompt_tokens) == ((1,), 3, 5)
    assert offer.request.decode_worker == target
    assert (offer.source, offer.lease_s) == ("decode-0", 10.0)


def test_heirs_take_turns(migration: Migration) -> None:
    targets = [migration.offer(sequence(5, 1, [page]), HEIRS, now_s=0.0)[0] for page in range(4)]
    assert targets == [HEIRS[0], HEIRS[1], HEIRS[0], HEIRS[1]]


def test_pages_come_back_when_they_were_taken_over(migration: Migration) -> None:
    _, offer = migration.offer(sequence(5, 1, [2, 5]), HEIRS, now_s=0.0)
    assert migration.reclaim(1.0) == []
    migration.handle(KvAck(lease_id=offer.lease_id))
    assert (migration.reclaim(1.0), len(migration)) == ([2, 5], 0)


def test_pages_come_back_when_the_request_is_aborted_or_nobody_comes(migration: Migration) -> None:
    migration.offer(sequence(5, 1, [2]), HEIRS, now_s=0.0)
    migration.abort(Abort(request_id=RequestId("a"), attempt=2))
    assert migration.reclaim(1.0) == []
    migration.abort(Abort(request_id=RequestId("a")))
    assert migration.reclaim(1.0) == [2]
    migration.offer(sequence(5, 1, [3]), HEIRS, now_s=1.0)
    assert migration.reclaim(11.1) == [3]


def test_pages_are_kept_for_an_heir_that_asks_for_time(migration: Migration) -> None:
    _, offer = migration.offer(sequence(5, 1, [2]), HEIRS, now_s=0.0)
    migration.handle(KvRenew(lease_id=offer.lease_id))
    assert migration.reclaim(9.0) == []
    assert migration.reclaim(18.9) == []
    assert migration.reclaim(19.0) == [2]


def test_each_sequence_is_offered_under_a_lease_of_its_own(migration: Migration) -> None:
    (_, first), (_, second) = (migration.offer(sequence(5, 1, [page]), HEIRS, now_s=0.0) for page in (2, 5))
    assert first.lease_id != second.lease_id
    assert len(migration) == 2
    migration.handle(KvAck(lease_id=first.lease_id))
    assert (migration.reclaim(1.0), len(migration)) == ([2], 1)


def test_another_choice_that_is_aborted_leaves_the_pages_of_this_one(migration: Migration) -> None:
    migration.offer(sequence(5, 1, [2]), HEIRS, now_s=0.0)
    migration.abort(Abort(request_id=RequestId("a"), choice=0))
    assert migration.reclaim(1.0) == []
    migration.abort(Abort(request_id=RequestId("a"), choice=1))
    assert migration.reclaim(1.0) == [2]


def test_an_heir_that_asks_for_the_pages_is_sent_them() -> None:
    cache = KvCache(read_config(EMBEDDED_MODEL), 8, 4, torch.float32, torch.device("cpu"))
    pages = torch.randn(cache.export_pages([5, 2]).shape)
    cache.import_pages([5, 2], pages)
    leases, channel = LeaseTable(lease_s=10.0), LocalChannel(20.0)
    sender = KvSender(cache, leases, {HEIRS[0]: channel})
    migration = Migration(WorkerId("decode-0"), leases, sender)
    _, offer = migration.offer(sequence(5, 1, [5, 2]), HEIRS, now_s=0.0)
    migration.handle(KvPull(lease_id=offer.lease_id, decode_worker=HEIRS[0], channel=0))
    arrived = channel.receive(pages.nbytes)
    assert arrived is not None
    assert torch.equal(arrived.view(torch.float32).view(pages.shape), pages)
    sender.close()
