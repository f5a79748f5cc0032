from __future__ import annotations

import random

import pytest

from cluster.frontend.scheduler import Assignment, DecodeView, PrefillView, Wait, schedule
from octet.ids import WorkerId


def prefill(number: int, queued_tokens: int = 0, cached_tokens: int = 0) -> PrefillView:
    return PrefillView(
        worker_id=WorkerId(f"prefill-{number}"), queued_tokens=queued_tokens, cached_tokens=cached_tokens
    )


def decode(number: int, free: int = 10, promised: int = 0, live: int = 0) -> DecodeView:
    return DecodeView(
        worker_id=WorkerId(f"decode-{number}"), free_pages=free, promised_pages=promised, live_sequences=live
    )


def assign(prefills: list[PrefillView], decodes: list[DecodeView]) -> Assignment:
    decision = schedule(prefills, decodes)
    assert isinstance(decision, Assignment)
    return decision


def test_the_prefill_worker_with_the_least_queued_work_is_taken() -> None:
    assert assign([prefill(0, 30), prefill(1, 10), prefill(2, 20)], [decode(0)]).prefill == "prefill-1"


@pytest.mark.parametrize(
    ("views", "taken"),
    [
        ([decode(0, free=5), decode(1, free=9), decode(2, free=7)], "decode-1"),
        ([decode(0, free=9, promised=8), decode(1, free=3)], "decode-1"),
        ([decode(0, free=4, live=3), decode(1, free=4, live=2)], "decode-1"),
        ([decode(0, free=2, promised=9), decode(1, free=2, promised=5)], "decode-1"),
    ],
    ids=["most free", "promised pages are taken", "smaller batch of equals", "least overdrawn"],
)
def test_the_decode_worker_with_the_most_pages_to_spare_is_taken(views: list[DecodeView], taken: str) -> None:
    assert assign([prefill(0)], views).decode == taken


def test_the_same_state_gives_the_same_decision_in_any_order() -> None:
    prefills, decodes = [prefill(n) for n in range(4)], [decode(n) for n in range(4)]
    random.shuffle(prefills)
    random.shuffle(decodes)
    decision = assign(prefills, decodes)
    assert (decision.prefill, decision.decode) == ("prefill-0", "decode-0")


def test_a_request_is_admitted_though_no_page_is_free() -> None:
    assert assign([prefill(0)], [decode(0, free=0, promised=50)]).decode == "decode-0"


def test_of_equal_queues_the_one_with_the_longest_prefix_is_taken() -> None:
    assert assign([prefill(0, 10, 16), prefill(1, 10, 64), prefill(2, 10, 32)], [decode(0)]).prefill == "prefill-1"


def test_a_prefix_does_not_outweigh_a_queue_that_is_longer_than_it() -> None:
    assert assign([prefill(0, 100, 64), prefill(1, 30)], [decode(0)]).prefill == "prefill-1"
    assert assign([prefill(0, 90, 64), prefill(1, 30)], [decode(0)]).prefill == "prefill-0"


def test_the_reason_tells_what_was_weighed() -> None:
    reason = assign([prefill(0, 12)], [decode(0, free=9, promised=2)]).reason
    assert reason == "prefill-0 has 12 tokens queued, 0 of the prompt cached; decode-0 has 7 pages to spare"


@pytest.mark.parametrize(
    ("prefills", "decodes", "missing"), [([], [decode(0)], "prefill"), ([prefill(0)], [], "decode")]
)
def test_a_request_waits_while_a_pool_is_empty(
    prefills: list[PrefillView], decodes: list[DecodeView], missing: str
) -> None:
    assert schedule(prefills, decodes) == Wait(reason=f"no {missing} worker is there")


def test_workers_that_failed_it_are_avoided_whatever_they_have_to_spare() -> None:
    decision = schedule(
        [prefill(0), prefill(1, 900)], [decode(0, free=90), decode(1)], [WorkerId("prefill-0"), WorkerId("decode-0")]
    )
    assert isinstance(decision, Assignment)
    assert (decision.prefill, decision.decode) == ("prefill-1", "decode-1")


def test_where_every_worker_failed_it_a_request_waits() -> None:
    decision = schedule([prefill(0)], [decode(0), decode(1)], [WorkerId("decode-0"), WorkerId("decode-1")])
    assert decision == Wait(reason="every decode worker has failed it: decode-0, decode-1")
