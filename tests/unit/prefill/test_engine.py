"""The prefill engine on the embedded model, its decode worker and frontend played by the tests."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from octet.errors import ExpertMissingError, LaneTimeoutError, WireError
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import (
    Abort,
    Failed,
    KvAck,
    KvOffer,
    KvPull,
    KvRenew,
    StepReport,
    TokenEvent,
    unpack_ids,
)
from octet.request import Output, Sampling, Stopping
from tests.unit.embedded import PAGE, Model
from tests.unit.prefill.alone import DECODE, FRONTEND, LAST_LAYER, LEASE_S, NUM_PAGES, Prefill, request

# What is computed, and in which order.


def test_no_step_computes_more_than_its_budget(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=5)
    prefill.run(request(7), request(3), request(6))
    assert prefill.routed.rows[1] == [5, 5, 5, 1]


@pytest.mark.parametrize(("beside", "sizes"), [([DECODE], [8, *[2] * 7]), ([], [8, 8, 6])])
def test_chunks_of_few_requests_are_shorter_beside_a_decode_worker(
    model: Model, beside: list[WorkerId], sizes: list[int]
) -> None:
    prefill = Prefill(model, chunk_tokens=8, beside=beside, few_requests=2)
    prefill.run(request(7), request(6), request(9))
    assert prefill.routed.rows[1] == sizes


def test_the_shortest_chunks_go_on_beside_a_decode_worker(model: Model) -> None:
    """A part of a chunk of one token would be none, and nothing would ever be computed."""
    prefill = Prefill(model, chunk_tokens=3, beside=[DECODE], few_requests=2)
    prefill.engine.handle(request(5))
    for _ in range(5):
        prefill.step()
    assert prefill.routed.rows[1] == [1] * 5
    assert len(prefill.offers()) == 1


def test_it_gathers_until_a_chunk_is_full(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=16)
    for num_tokens, gathers in ((7, True), (8, True), (1, False)):
        prefill.engine.handle(dataclasses.replace(request(num_tokens), arrival_s=10.0))
        assert prefill.engine.gathers == gathers


def test_it_gathers_nobody_for_a_prompt_after_one_that_came_alone(model: Model) -> None:
    prefill = Prefill(model)
    for seconds, gathers in ((10.0, True), (20.0, False), (20.0005, True), (30.0, True), (40.0, False)):
        prefill.engine.handle(dataclasses.replace(request(3), arrival_s=seconds))
        assert prefill.engine.gathers == gathers


def test_the_first_token_does_not_depend_on_how_prompts_are_cut(model: Model) -> None:
    requests = [request(length) for length in (9, 1, 14)]
    first_tokens = []
    for chunk_tokens in (512, 4, 1):
        prefill = Prefill(model, chunk_tokens=chunk_tokens)
        prefill.run(*requests)
        first_tokens.append(prefill.tokens())
    assert len(first_tokens[0]) == 3
    assert first_tokens[1:] == first_tokens[:1] * 2


def test_requests_are_served_by_priority_then_arrival(model: Model) -> None:
    prefill = Prefill(model, max_requests=1, chunk_tokens=4)
    prefill.run(
        request(name="c", priority=2, arrival_s=1),
        request(name="b", priority=0, arrival_s=8),
        request(name="a", priority=0, arrival_s=7),
    )
    assert [event.request_id for event in prefill.events(TokenEvent)] == ["a", "b", "c"]


def test_what_has_begun_counts_until_its_first_token_without_what_is_cached(model: Model) -> None:
    prefill = Prefill(model, max_requests=1, chunk_tokens=4)
    first, more = request(9), request(7)
    longer = dataclasses.replace(more, token_ids=first.token_ids + more.token_ids, num_prompt_tokens=16)
    found = []
    for one in (first, longer):
        prefill.engine.handle(one)
        found.append(prefill.engine.load().begun_tokens)
    for _ in range(5):
        prefill.step()
        found.append(prefill.engine.load().begun_tokens)
    # Chunks of 4, 4 and 1 tokens, then two of 4: of the 16 tokens, two pages are known.
    assert found == [0, 0, 9, 9, 0, 8, 0]


def test_a_request_that_waits_for_pages_starts_when_they_come_back(model: Model) -> None:
    prefill = Prefill(model, num_pages=3)
    prefill.run(request(9, name="first"))
    prefill.engine.handle(request(9, name="second"))
    prefill.step()
    assert len(prefill.events(TokenEvent)) == 1
    prefill.engine.handle(KvAck(lease_id=prefill.offers()[0].lease_id))
    prefill.step()
    assert [event.request_id for event in prefill.events(TokenEvent)] == ["first", "second"]


def test_a_request_that_waits_for_pages_is_no_work(model: Model) -> None:
    prefill = Prefill(model, num_pages=3)
    prefill.run(request(9))
    prefill.engine.handle(request(9))
    assert not prefill.engine.busy
    prefill.now_s = LEASE_S
    prefill.step()
    assert len(prefill.events(TokenEvent)) == 2


def test_a_request_whose_pages_are_cached_and_held_is_work(prefill: Prefill) -> None:
    """A lease holds ten pages of sixteen; of the same prompt again only the last page is another one."""
    asked = request(10 * PAGE)
    prefill.run(asked)
    assert prefill.num_free == NUM_PAGES - 10
    prefill.run(dataclasses.replace(asked, request_id=RequestId("again")))
    assert [event.request_id for event in prefill.events(TokenEvent)] == [asked.request_id, "again"]


# What is told.


def test_each_choice_draws_its_own_first_token(prefill: Prefill) -> None:
    prefill.run(request(choices=tuple(range(6)), sampling=Sampling(temperature=5.0, seed=1)))
    assert len(set(prefill.tokens().values())) > 1


def test_an_offer_carries_the_first_tokens_of_the_choices_that_go_on(prefill: Prefill) -> None:
    asked = request(choices=(0, 1, 2, 3), sampling=Sampling(temperature=5.0, seed=1))
    prefill.run(asked)
    tokens = [prefill.tokens()[asked.request_id, choice] for choice in range(4)]
    ends = dataclasses.replace(asked, stopping=Stopping(max_new_tokens=10, stop_token_ids=(tokens[1],)))
    prefill.run(dataclasses.replace(ends, request_id=RequestId("ends")))
    offer = prefill.offers()[-1]
    going_on = [(choice, token_id) for choice, token_id in enumerate(tokens) if token_id != tokens[1]]
    assert list(zip(offer.request.choices, offer.next_tokens, strict=True)) == going_on


def test_a_request_that_ends_with_its_first_token_leaves_nothing(prefill: Prefill) -> None:
    prefill.run(request(choices=(0, 1), max_new_tokens=1))
    assert [event.finish_reason for event in prefill.events(TokenEvent)] == ["length", "length"]
    assert (prefill.num_free, prefill.offers()) == (NUM_PAGES, [])


def test_an_offer_goes_to_the_decode_worker_and_tokens_to_the_frontend(prefill: Prefill) -> None:
    prefill.run(request())
    assert [(to, type(message)) for to, message in prefill.said] == [(FRONTEND, StepReport), (DECODE, KvOffer)]


def test_an_offer_to_a_worker_on_the_same_cores_says_how_many_the_next_chunk_brings(model: Model) -> None:
    sizes = (6, 6, 6, 5, 9)
    prefill = Prefill(model, chunk_tokens=12, beside=[DECODE])
    prefill.run(*(request(size) for size in sizes), request(2, max_new_tokens=1))
    # The first to be told of counts the others of its own chunk as well. One that ends with its first token does not.
    assert [offer.following for offer in prefill.offers()] == [3, 2, 2, 1, 0]
    elsewhere = Prefill(model, chunk_tokens=12)
    elsewhere.run(*(request(size) for size in sizes))
    assert [offer.following for offer in elsewhere.offers()] == [0] * len(sizes)


def test_what_follows_for_another_decode_worker_is_not_counted(model: Model) -> None:
    """Whoever waits for those would wait until the end of its patience."""
    other = WorkerId("decode-1")
    prefill = Prefill(model, chunk_tokens=12, beside=[DECODE, other])
    prefill.run(*(dataclasses.replace(request(6), decode_worker=to) for to in (DECODE, other, other, DECODE)))
    assert [offer.following for offer in prefill.offers()] == [1, 1, 0, 0]


def test_of_the_last_layer_only_what_the_next_token_depends_on_is_computed(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=5)
    prefill.run(request(12), request(3))
    assert prefill.routed.rows[LAST_LAYER - 1] == [5, 5, 5]
    assert prefill.routed.rows[LAST_LAYER] == [2]


def test_prompt_logprobs_take_all_of_the_last_layer(model: Model) -> None:
    prefill = Prefill(model)
    prefill.run(request(12, output=Output(logprobs=0, prompt_logprobs=True)), request(3))
    assert prefill.routed.rows[LAST_LAYER] == [1, 12]


def test_a_recomputed_choice_goes_on_at_its_next_index(prefill: Prefill) -> None:
    again = dataclasses.replace(request(9), num_prompt_tokens=6, attempt=4, choices=(2,))
    prefill.run(again)
    (event,) = prefill.events(TokenEvent)
    assert (event.index, event.attempt, event.choice) == (3, 4, 2)


def test_prompt_logprobs_do_not_depend_on_how_the_prompt_is_cut(model: Model) -> None:
    asked = request(13, output=Output(logprobs=2, prompt_logprobs=True))
    reported = []
    for chunk_tokens in (512, 3):
        prefill = Prefill(model, chunk_tokens=chunk_tokens)
        prefill.run(asked)
        reported.append(prefill.events(TokenEvent)[0].prompt_logprobs)
    whole, cut = reported
    assert [entry.token_id for entry in cut] == [entry.token_id for entry in whole]
    assert cut[0].logprob is None
    assert [entry.logprob for entry in cut[1:]] == pytest.approx([entry.logprob for entry in whole[1:]], abs=1e-4)


def test_a_first_token_behind_cached_pages_has_the_same_logprob(prefill: Prefill) -> None:
    """Of the second one a single token is computed: the rest is whole pages, which are cached."""
    asked = request(2 * PAGE + 1, output=Output(logprobs=3))
    prefill.run(asked)
    prefill.run(dataclasses.replace(asked, request_id=RequestId("again")))
    first, again = prefill.events(TokenEvent)
    assert (first.cached_tokens, again.cached_tokens) == (0, 2 * PAGE)
    assert again.logprob == first.logprob is not None


def test_computed_tokens_are_counted(prefill: Prefill) -> None:
    prefill.run(request(7), request(5))
    assert prefill.engine.load().tokens == 12


# Pages come back.


def test_aborting_a_waiting_request_forgets_it(model: Model) -> None:
    prefill = Prefill(model, max_requests=1, chunk_tokens=2)
    prefill.engine.handle(request(6))
    prefill.step()
    prefill.engine.handle(request(6, name="waiting"))
    prefill.engine.handle(Abort(request_id=RequestId("waiting")))
    prefill.run()
    assert len(prefill.events(TokenEvent)) == 1


def test_aborting_a_running_request_frees_its_pages(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=2)
    asked = request(9)
    prefill.engine.handle(asked)
    prefill.step()
    assert prefill.num_free == NUM_PAGES - 3
    prefill.engine.handle(Abort(request_id=asked.request_id))
    prefill.run()
    assert (prefill.num_free, prefill.events(TokenEvent)) == (NUM_PAGES, [])


def test_aborting_a_leased_request_frees_its_pages(prefill: Prefill) -> None:
    asked = request(9)
    prefill.run(asked)
    assert prefill.num_free == NUM_PAGES - 3
    prefill.engine.handle(Abort(request_id=asked.request_id))
    prefill.step()
    assert (prefill.num_free, prefill.engine.load().leases) == (NUM_PAGES, 0)


def test_aborting_one_choice_of_several_leaves_the_others(prefill: Prefill) -> None:
    asked = request(9, choices=(0, 1))
    prefill.engine.handle(asked)
    prefill.engine.handle(Abort(request_id=asked.request_id, choice=0))
    prefill.run()
    assert prefill.offers()[0].request.choices == (0, 1)


@pytest.mark.parametrize("state", ["waiting", "running", "leased"])
def test_aborting_another_attempt_leaves_this_one(model: Model, state: str) -> None:
    """It was computed elsewhere, or here before: whoever asked again still waits for an answer."""
    prefill = Prefill(model, chunk_tokens=4)
    again = dataclasses.replace(request(9), attempt=2)
    prefill.engine.handle(again)
    for _ in range({"waiting": 0, "running": 1, "leased": 3}[state]):
        prefill.step()
    prefill.engine.handle(Abort(request_id=again.request_id, attempt=1))
    while prefill.engine.busy:
        prefill.step()
    prefill.step()
    assert [offer.request.attempt for offer in prefill.offers()] == [2]
    assert prefill.engine.load().leases == 1
    prefill.engine.handle(Abort(request_id=again.request_id, attempt=2))
    prefill.step()
    assert (prefill.engine.load().leases, prefill.engine.load().running, prefill.engine.load().waiting) == (0, 0, 0)


def test_an_acknowledged_lease_frees_its_pages(prefill: Prefill) -> None:
    prefill.run(request(9))
    prefill.engine.handle(KvAck(lease_id=prefill.offers()[0].lease_id))
    prefill.step()
    assert prefill.num_free == NUM_PAGES


def test_a_lease_frees_its_pages_at_its_deadline(prefill: Prefill) -> None:
    prefill.run(request(9))
    prefill.now_s = LEASE_S - 0.1
    prefill.step()
    assert prefill.num_free == NUM_PAGES - 3
    prefill.now_s = LEASE_S
    prefill.step()
    assert prefill.num_free == NUM_PAGES


def test_a_renewed_lease_keeps_its_pages(prefill: Prefill) -> None:
    prefill.run(request(9))
    (offer,) = prefill.offers()
    prefill.engine.handle(KvRenew(lease_id=offer.lease_id))
    prefill.now_s = LEASE_S - 1
    prefill.step()
    prefill.now_s = LEASE_S + 1
    prefill.step()
    assert prefill.engine.load().leases == 1
    prefill.now_s = 2 * LEASE_S
    prefill.step()
    assert prefill.engine.load().leases == 0


# The hand-off.


def test_a_pull_is_answered_with_the_leases_pages(prefill: Prefill) -> None:
    prefill.run(request(9))
    prefill.engine.handle(KvPull(lease_id=prefill.offers()[0].lease_id, decode_worker=DECODE, channel=0))
    pages = prefill.channel.receive(3 * prefill.page_bytes)
    assert pages is not None
    assert bool(pages.view(torch.float32).any())


@pytest.mark.parametrize("lease", ["over", "unknown"])
def test_a_pull_of_a_lease_that_is_gone_is_answered_so(prefill: Prefill, lease: str) -> None:
    prefill.run(request(9))
    prefill.now_s = LEASE_S
    prefill.step()
    lease_id = prefill.offers()[0].lease_id if lease == "over" else LeaseId("unknown")
    prefill.engine.handle(KvPull(lease_id=lease_id, decode_worker=DECODE, channel=0))
    assert prefill.channel.receive(3 * prefill.page_bytes) is None


def test_leases_have_different_ids(prefill: Prefill) -> None:
    prefill.run(request(), request(), request())
    assert len({offer.lease_id for offer in prefill.offers()}) == 3


# Faults.


@pytest.mark.parametrize("layer", [1, 2])
def test_a_step_that_loses_its_lane_may_be_run_again(model: Model, layer: int) -> None:
    requests = [request(7), request(5)]
    undisturbed, disturbed = Prefill(model, chunk_tokens=5), Prefill(model, chunk_tokens=5)
    undisturbed.run(*requests)
    for each in requests:
        disturbed.engine.handle(each)
    while disturbed.engine.busy:
        disturbed.routed.fail_once(layer, LaneTimeoutError("shard 0 is silent"))
        with pytest.raises(LaneTimeoutError):
            disturbed.step()
        disturbed.step()
    assert disturbed.said == undisturbed.said


def test_a_missing_expert_fails_the_requests_of_its_step_retryably_and_says_why(prefill: Prefill) -> None:
    prefill.routed.fail_once(2, ExpertMissingError("layer 2: no expert in slots [7]"))
    prefill.run(request(choices=(0, 1)), request())
    told = [(failure.reason, failure.retryable) for failure in prefill.events(Failed)]
    assert told == [("layer 2: no expert in slots [7]", True)] * 3


def test_a_prompt_whose_numbers_overflow_fails_alone_and_is_never_taken_from_the_cache(model: Model) -> None:
    """As where an embedding is damaged."""
    embedding = model.weights.embedding
    assert isinstance(embedding, torch.Tensor)
    fatal, lucky = request(12), request(12)
    damaged = embedding.clone()
    damaged[next(token for token in unpack_ids(fatal.token_ids) if token not in unpack_ids(lucky.token_ids))] = (
        torch.nan
    )
    prefill = Prefill(dataclasses.replace(model, weights=dataclasses.replace(model.weights, embedding=damaged)))
    prefill.run(fatal, lucky)
    prefill.run(again := dataclasses.replace(fatal, request_id=RequestId("again")))
    assert [(failure.request_id, failure.retryable) for failure in prefill.events(Failed)] == [
        (fatal.request_id, False),
        (again.request_id, False),
    ]
    assert [event.request_id for event in prefill.events(TokenEvent)] == [lucky.request_id]
    assert prefill.engine.load().cached_tokens == 0
    prefill.sender.close()


def test_a_missing_expert_fails_no_request_that_was_not_in_the_step(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=8, max_requests=3)
    prefill.routed.fail_once(1, ExpertMissingError("gone"))
    prefill.run(request(6, name="whole"), request(6, name="cut"), request(6, name="behind"), request(6, name="waiting"))
    assert [failure.request_id for failure in prefill.events(Failed)] == ["whole", "cut"]
    assert [event.request_id for event in prefill.events(TokenEvent)] == ["behind", "waiting"]
    for offer in prefill.offers():
        prefill.engine.handle(KvAck(lease_id=offer.lease_id))
    prefill.step()
    assert prefill.num_free == NUM_PAGES


def test_a_missing_expert_yields_no_token(prefill: Prefill) -> None:
    prefill.routed.fail_once(3, ExpertMissingError("gone"))
    prefill.run(request())
    assert (prefill.events(TokenEvent), prefill.offers(), prefill.num_free) == ([], [], NUM_PAGES)


def test_failing_all_ends_waiting_and_running_requests(model: Model) -> None:
    prefill = Prefill(model, max_requests=1, chunk_tokens=2)
    for name in ("running", "waiting"):
        prefill.engine.handle(request(6, name=name))
    prefill.step()
    prefill.engine.fail_all("the lane is gone")
    prefill.said += prefill.engine.flush()
    assert sorted((f.request_id, f.reason) for f in prefill.events(Failed)) == [
        ("running", "the lane is gone"),
        ("waiting", "the lane is gone"),
    ]
    assert (prefill.num_free, prefill.engine.busy) == (NUM_PAGES, False)


def test_a_message_for_someone_else_is_an_error(prefill: Prefill) -> None:
    prefill.run(request())
    with pytest.raises(WireError, match="KvOffer"):
        prefill.engine.handle(prefill.offers()[0])
