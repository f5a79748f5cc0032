"""The decode engine: sequences that wait for room, give way, are computed again, and are handed over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from octet.ids import WorkerId
from octet.messages import (
    Abort,
    Evicted,
    KvAck,
    KvOffer,
    KvRenew,
    StepReport,
    TokenEvent,
    unpack_ids,
)
from octet.request import Output
from tests.unit.decode.pair import LEASE_S, LONG, NUM_PAGES, RANDOM, Pair, alone, request
from tests.unit.embedded import PAGE

# Leases and preemption.


def test_a_lease_that_was_over_before_the_pull_is_evicted_and_the_request_still_finishes(
    pairs: Callable[..., Pair],
) -> None:
    asked = request(9)
    pair = pairs()
    pair.hold_pulls()
    pair.submit(asked)
    pair.step()
    # It was renewed once, and then nothing was heard.
    for _ in range(2):
        pair.now_s += LEASE_S
        pair.step_prefill()
    assert pair.num_free[0] == 64
    pair.release_pull()
    pair.wait_for_arrival()
    pair.held = None
    pair.run()
    assert [event.reason for event in pair.of(Evicted)] == ["its lease was over before the pages were taken"]
    assert pair.tokens() == alone(pairs, asked)


def test_a_lease_lasts_as_long_as_its_request_waits_for_room(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.submit(request(max_new_tokens=40))
    pair.until_running()
    pair.submit(request())
    for _ in range(20):
        pair.step()
        pair.now_s += LEASE_S / 2
    pair.run()
    assert pair.of(Evicted) == []


def test_a_lease_lasts_as_long_as_its_pages_wait_to_be_sent(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9)
    pair.submit(asked)
    pair.step()
    for _ in range(6):
        pair.now_s += LEASE_S / 2
        pair.step_decode()
        pair.step_prefill()
    pair.release_pull()
    pair.wait_for_arrival()
    pair.held = None
    pair.run()
    assert pair.of(Evicted) == []


def test_leases_are_renewed_in_time_for_the_shortest(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.submit(request(max_new_tokens=LONG))
    pair.until_running()
    pair.submit(request(), request())
    offers = [message for _, message in pair.prefill.step(0.0) if isinstance(message, KvOffer)]
    for offer, lease_s in zip(offers, (6.0, 60.0), strict=True):
        pair.decode.handle(dataclasses.replace(offer, lease_s=lease_s))
    renewed = []
    for now_s in (100.0, 101.9, 102.1):
        said = pair.decode.step(now_s)
        renewed.append([message.lease_id for _, message in said if isinstance(message, KvRenew)])
    both = [offer.lease_id for offer in offers]
    assert renewed == [both, [], both]


def test_pages_that_cannot_be_fetched_are_given_back_at_both_ends(pair: Pair) -> None:
    asked, gone = request(9, choices=(0, 1)), WorkerId("prefill-9")
    pair.submit(asked)
    (offer,) = [message for _, message in pair.prefill.step(0.0) if isinstance(message, KvOffer)]
    pair.decode.handle(dataclasses.replace(offer, source=gone))
    said = [*pair.decode.step(0.0), *pair.decode.step(0.0)]
    assert (gone, KvAck(lease_id=offer.lease_id)) in said
    events = [event for _, message in said if isinstance(message, StepReport) for event in message.events]
    assert [(event.choice, type(event)) for event in events] == [(0, Evicted), (1, Evicted)]
    assert pair.decode.load().kv_pages_free == NUM_PAGES


def test_the_youngest_gives_way_and_everyone_still_finishes(pairs: Callable[..., Pair]) -> None:
    requests = [request(6, max_new_tokens=20), request(6, max_new_tokens=20), request(6, max_new_tokens=20)]
    pair = pairs(num_pages=12)
    pair.run(*requests)
    assert {event.request_id for event in pair.of(Evicted)} >= {requests[-1].request_id}
    assert requests[0].request_id not in {event.request_id for event in pair.of(Evicted)}
    assert pair.tokens() == alone(pairs, *requests)


def test_preemptions_are_counted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(num_pages=12)
    pair.run(*(request(6, max_new_tokens=20) for _ in range(3)))
    assert pair.decode.load().preemptions == len(pair.of(Evicted)) > 0


def test_an_offer_waits_while_the_batch_is_full(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=2)
    pair.submit(*(request() for _ in range(4)))
    most = 0
    while not all(journal.ended for journal in pair.journals.values()):
        pair.step()
        most = max(most, pair.decode.load().running)
    assert most == 2


def test_of_those_that_wait_the_most_urgent_comes_first(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, later, urgent = request(), request(), dataclasses.replace(request(), priority=-1)
    pair.submit(running)
    pair.until_running()
    for each in (later, urgent):
        pair.submit(each)
        pair.step_prefill()
    pair.run()
    ends = [event.request_id for event in pair.of(TokenEvent) if event.finish_reason is not None]
    assert ends == [running.request_id, urgent.request_id, later.request_id]


def test_of_those_that_wait_the_earliest_comes_first_though_it_was_offered_later(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, early, late = request(), request(), request()
    pair.submit(running)
    pair.until_running()
    for each in (late, early):
        pair.submit(each)
        pair.step_prefill()
    pair.run()
    ends = [event.request_id for event in pair.of(TokenEvent) if event.finish_reason is not None]
    assert ends == [running.request_id, early.request_id, late.request_id]


def test_choices_with_a_last_page_of_their_own_arrive_at_the_first_try(pair: Pair) -> None:
    pair.run(request(PAGE + 2, choices=(0, 1, 2)))
    assert pair.of(Evicted) == []


@pytest.mark.parametrize("num_pages", [NUM_PAGES, 64])
@pytest.mark.parametrize("chunk_tokens", [7, 512])
def test_what_is_computed_again_has_the_same_bits(
    pairs: Callable[..., Pair], chunk_tokens: int, num_pages: int
) -> None:
    """The answer's tokens attend one by one again, as they did: else a near tie might end another way."""
    num_prompt, num_new = int(torch.randint(1, 40, (), generator=RANDOM)), 60
    asked = request(num_prompt, max_new_tokens=num_new, output=Output(logprobs=2))
    undisturbed, disturbed = pairs(num_pages=num_pages), pairs(num_pages=num_pages, chunk_tokens=chunk_tokens)
    undisturbed.run(asked)
    disturbed.submit(asked)
    known = int(torch.randint(2, num_new, (), generator=RANDOM))
    disturbed.until(lambda: len(disturbed.of(TokenEvent)) >= known)
    disturbed.abort(asked)
    (again,) = disturbed.journals[asked.request_id].compute_again([0])
    disturbed.prefill.handle(again)
    disturbed.until(lambda: disturbed.journals[asked.request_id].ended)
    told = [[event.logprob for event in pair.of(TokenEvent)] for pair in (undisturbed, disturbed)]
    assert told[0] == told[1]


# Leaving.


def test_who_leaves_hands_every_sequence_over_and_keeps_its_pages_until_they_were_taken(pair: Pair) -> None:
    first, second = request(9, max_new_tokens=LONG), request(5, max_new_tokens=LONG)
    pair.submit(first, second)
    pair.until_running(2)
    pair.step_decode()
    tokens, heir = pair.tokens(), WorkerId("decode-1")
    pair.decode.hand_over_to([heir])
    said = pair.decode.step(pair.now_s)
    offers = {
        message.request.request_id: message for to, message in said if to == heir and isinstance(message, KvOffer)
    }
    for each in (first, second):
        (last,) = offers[each.request_id].next_tokens
        assert [*unpack_ids(offers[each.request_id].request.token_ids), last] == [
            *unpack_ids(each.token_ids),
            *tokens[each.request_id, 0],
        ]
    load = pair.decode.load()
    assert (load.running, load.leases) == (0, 2)
    assert load.kv_pages_free == NUM_PAGES - sum(-(-offer.request.num_tokens // PAGE) for offer in offers.values())
    pair.decode.handle(KvAck(lease_id=offers[first.request_id].lease_id))
    pair.decode.handle(Abort(request_id=second.request_id))
    assert pair.decode.step(pair.now_s) == []
    assert (pair.decode.load().leases, pair.decode.load().kv_pages_free) == (0, NUM_PAGES)


def test_a_sequence_that_was_handed_over_is_kept_for_an_heir_that_asks_for_time(pair: Pair) -> None:
    pair.submit(request(9, max_new_tokens=LONG))
    pair.until_running()
    pair.decode.hand_over_to([WorkerId("decode-1")])
    (offer,) = [message for _, message in pair.decode.step(0.0) if isinstance(message, KvOffer)]
    for now_s in (0.9 * LEASE_S, 1.8 * LEASE_S):
        pair.decode.handle(KvRenew(lease_id=offer.lease_id))
        pair.decode.step(now_s)
        assert pair.decode.load().leases == 1
    pair.decode.step(2.8 * LEASE_S)
    assert (pair.decode.load().leases, pair.decode.load().kv_pages_free) == (0, NUM_PAGES)


def test_where_nobody_takes_over_sequences_are_computed_again(pair: Pair) -> None:
    asked = request(9, max_new_tokens=LONG, choices=(0, 1))
    pair.submit(asked)
    pair.until_running(2)
    pair.decode.hand_over_to([])
    pair.step_decode()
    assert [(event.choice, event.reason) for event in pair.of(Evicted)] == [
        (choice, "its decode worker leaves") for choice in (0, 1)
    ]
    assert pair.num_free[1] == NUM_PAGES
