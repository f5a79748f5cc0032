"""The decode engine: its steps, aborts in every state, and faults."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch

from octet.errors import ExpertMissingError, PeerLostError, WireError
from octet.ids import RequestId
from octet.messages import (
    Abort,
    Evicted,
    Failed,
    TokenEvent,
    unpack_ids,
)
from octet.request import Output, Sampling, Stopping
from tests.unit.decode.pair import LONG, NUM_PAGES, PATIENT_S, Pair, alone, request
from tests.unit.embedded import Model

# Steps.


def test_one_step_gives_every_sequence_one_token(pair: Pair) -> None:
    pair.submit(request(max_new_tokens=LONG), request(9, max_new_tokens=LONG))
    pair.until_running(2)
    before = len(pair.of(TokenEvent))
    pair.step_decode()
    assert len(pair.of(TokenEvent)) - before == 2


def test_the_first_of_a_burst_wait_for_the_others(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    pair.submit(*(request(6, max_new_tokens=3) for _ in range(5)))
    pair.until(lambda: len(pair.of(TokenEvent)) >= 4)
    assert not pair.decode.busy
    pair.until(lambda: all(journal.ended for journal in pair.journals.values()))
    # What the prefill worker sampled; then all of them at once.
    assert [event.index for event in pair.of(TokenEvent)] == [0] * 5 + [1] * 5 + [2] * 5


def test_the_first_of_a_burst_wait_no_longer_than_they_may(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    pair.submit(*(request(6, max_new_tokens=LONG) for _ in range(3)))
    pair.step_prefill()
    until_s = time.monotonic() + PATIENT_S
    while pair.decode.load().running < 2:
        assert time.monotonic() < until_s
        pair.step_decode()
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0]
    pair.now_s = 1.0
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0, 1, 1]


def test_the_first_of_a_burst_do_not_wait_for_one_that_was_aborted(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    requests = [request(6, max_new_tokens=LONG) for _ in range(3)]
    pair.submit(*requests)
    pair.step_prefill()
    until_s = time.monotonic() + PATIENT_S
    while pair.decode.load().running < 2:
        assert time.monotonic() < until_s
        pair.step_decode()
    assert not pair.decode.busy
    pair.abort(requests[2])
    pair.step_decode()
    assert [event.index for event in pair.of(TokenEvent)] == [0, 0, 1, 1]


def test_the_first_of_a_later_burst_wait_as_well(pairs: Callable[..., Pair]) -> None:
    pair = pairs(chunk_tokens=12)
    for _ in range(2):
        pair.events.clear()
        pair.run(*(request(6, max_new_tokens=3) for _ in range(5)))
        pair.step_decode()
        assert [event.index for event in pair.of(TokenEvent)] == [0] * 5 + [1] * 5 + [2] * 5


def test_a_request_gets_as_many_tokens_as_it_asked_for(pair: Pair) -> None:
    asked = request(max_new_tokens=9)
    pair.run(asked)
    assert [event.index for event in pair.of(TokenEvent)] == list(range(9))
    assert pair.of(TokenEvent)[-1].finish_reason == "length"


def test_a_stop_id_ends_a_sequence(pairs: Callable[..., Pair]) -> None:
    asked = request()
    tokens = alone(pairs, asked)[asked.request_id, 0]
    stop = tokens[4]
    pair = pairs()
    pair.run(dataclasses.replace(asked, stopping=Stopping(max_new_tokens=8, stop_token_ids=(stop,))))
    assert pair.tokens()[asked.request_id, 0] == tokens[: tokens.index(stop) + 1]
    assert pair.of(TokenEvent)[-1].finish_reason == "stop"


def test_requests_join_and_leave_between_steps(pairs: Callable[..., Pair]) -> None:
    requests = [request(5, max_new_tokens=12), request(11, max_new_tokens=4), request(2, max_new_tokens=9)]
    pair = pairs()
    for each in requests:
        pair.submit(each)
        for _ in range(3):
            pair.step()
    pair.run()
    assert pair.tokens() == alone(pairs, *requests)


@pytest.mark.parametrize("num_tokens", [6, 8], ids=["partial last page", "full last page"])
def test_choices_go_their_own_ways_from_shared_pages(pairs: Callable[..., Pair], num_tokens: int) -> None:
    asked = request(num_tokens, choices=(0, 1, 2), sampling=Sampling(temperature=1.0, seed=5))
    pair = pairs()
    pair.run(asked)
    expected = alone(pairs, *(dataclasses.replace(asked, choices=(choice,)) for choice in asked.choices))
    assert pair.tokens() == expected


def test_logprobs_are_told_to_those_who_asked(pair: Pair) -> None:
    asked, silent = request(output=Output(logprobs=2)), request()
    pair.run(asked, silent)
    for event in pair.of(TokenEvent):
        if event.request_id == silent.request_id:
            assert event.logprob is None
        else:
            assert event.logprob is not None
            assert (event.logprob.token_id, len(event.logprob.top)) == (event.token_id, 2)


def test_all_pages_are_free_when_all_is_done(pair: Pair) -> None:
    pair.run(request(), request(9, choices=(0, 1, 2)), request(4, max_new_tokens=1))
    pair.until_free()


def test_tokens_are_counted(pair: Pair) -> None:
    pair.run(request(max_new_tokens=5), request(max_new_tokens=4, choices=(0, 1)))
    assert pair.decode.load().tokens == 4 + 2 * 3


# Aborts, in every state.


def test_aborting_a_running_request_frees_its_pages(pair: Pair) -> None:
    asked = request(9, choices=(0, 1))
    pair.submit(asked)
    pair.until_running(2)
    pair.abort(asked)
    pair.until_free()
    assert not pair.decode.busy


def test_aborting_one_running_choice_leaves_the_others(pairs: Callable[..., Pair]) -> None:
    asked = request(6, choices=(0, 1))
    pair = pairs()
    pair.submit(asked)
    pair.until_running(2)
    pair.abort(asked, 0)
    pair.journals[asked.request_id].end(0)
    pair.run()
    assert pair.tokens()[asked.request_id, 1] == alone(pairs, asked)[asked.request_id, 1]


def test_aborting_an_offered_request_frees_its_lease(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, offered = request(), request()
    pair.submit(running)
    pair.until_running()
    pair.submit(offered)
    pair.step()
    assert pair.decode.load().waiting == 1
    pair.decode.handle(Abort(request_id=offered.request_id))
    pair.step_decode()
    assert pair.decode.load().waiting == 0
    assert len(pair.acks) == 2
    pair.abort(running)
    pair.until_free()


def test_aborting_the_only_choice_of_an_offered_request_frees_its_lease(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.submit(request(max_new_tokens=LONG))
    pair.until_running()
    offered = request()
    pair.submit(offered)
    pair.step()
    pair.decode.handle(Abort(request_id=offered.request_id, choice=0))
    assert pair.decode.load().waiting == 0
    pair.step_decode()
    assert len(pair.acks) == 2


def test_aborting_an_incoming_request_frees_its_pages_when_they_arrive(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9)
    pair.submit(asked)
    pair.step()
    assert pair.num_free[1] == NUM_PAGES - 3
    pair.decode.handle(Abort(request_id=asked.request_id))
    pair.step()
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()
    assert pair.of(Evicted) == []


def test_aborting_an_incoming_request_at_both_workers_frees_its_pages(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9)
    pair.submit(asked)
    pair.step()
    pair.abort(asked)
    pair.step()
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()
    assert pair.of(Evicted) == []


def test_aborting_one_incoming_choice_leaves_the_others(pair: Pair) -> None:
    pair.hold_pulls()
    asked = request(9, choices=(0, 1))
    pair.submit(asked)
    pair.step()
    pair.decode.handle(Abort(request_id=asked.request_id, choice=0))
    pair.journals[asked.request_id].end(0)
    pair.release_pull()
    pair.wait_for_arrival()
    pair.run()
    pair.until_free()
    assert [event.choice for event in pair.of(TokenEvent) if event.index > 0] == [1] * 7


def test_aborting_another_attempt_leaves_what_is_offered_and_what_is_incoming(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    pair.hold_pulls()
    incoming, offered = request(), request()
    pair.submit(incoming, offered)
    pair.step()
    assert pair.decode.load().waiting == 2
    for each in (incoming, offered):
        pair.decode.handle(Abort(request_id=each.request_id, attempt=7))
    pair.release_pull()
    pair.held = None
    pair.wait_for_arrival()
    pair.run()
    assert pair.tokens() == alone(pairs, incoming, offered)


def test_aborting_an_unknown_request_does_nothing(pair: Pair) -> None:
    pair.decode.handle(Abort(request_id=RequestId("nobody")))
    pair.step()
    assert (pair.events, pair.acks) == ([], [])


# Faults.


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_step_that_loses_its_lane_may_be_run_again(pairs: Callable[..., Pair], layer: int) -> None:
    requests = [request(6, max_new_tokens=LONG), request(3, max_new_tokens=LONG)]
    pair = pairs()
    pair.submit(*requests)
    pair.until_running(2)
    while pair.decode.busy:
        pair.routed.fail_once(layer, PeerLostError("shard 0 is gone"))
        before = pair.tokens(), pair.decode.load().tokens
        with pytest.raises(PeerLostError):
            pair.step_decode()
        assert (pair.tokens(), pair.decode.load().tokens) == before
        pair.step_decode()
    assert pair.tokens() == alone(pairs, *requests)


def test_a_missing_expert_fails_the_requests_of_its_step_retryably_and_says_why(pair: Pair) -> None:
    pair.submit(request(choices=(0, 1), max_new_tokens=LONG), request(max_new_tokens=LONG))
    pair.until_running(3)
    pair.routed.fail_once(2, ExpertMissingError("layer 2: no expert in slots [7]"))
    pair.step_decode()
    told = [(event.reason, event.retryable) for event in pair.of(Failed)]
    assert told == [("layer 2: no expert in slots [7]", True)] * 3


def test_a_missing_expert_fails_no_request_that_was_not_in_the_step(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=1)
    running, offered = request(), request()
    pair.submit(running)
    pair.until_running()
    pair.submit(offered)
    pair.step_prefill()
    pair.routed.fail_once(1, ExpertMissingError("gone"))
    pair.run()
    assert [event.request_id for event in pair.of(Failed)] == [running.request_id]
    assert pair.tokens()[offered.request_id, 0] == alone(pairs, offered)[offered.request_id, 0]


def test_a_missing_expert_yields_no_token(pair: Pair) -> None:
    pair.submit(request())
    pair.until_running()
    before = len(pair.of(TokenEvent))
    pair.routed.fail_once(1, ExpertMissingError("gone"))
    pair.until_free()
    assert len(pair.of(TokenEvent)) == before


def test_a_sequence_whose_numbers_overflow_fails_alone(model: Model) -> None:
    """As where an embedding is damaged: what is written after that token has no logits."""
    embedding = model.weights.embedding
    assert isinstance(embedding, torch.Tensor)
    undisturbed = Pair(model)
    requests = [request(max_new_tokens=LONG, output=Output(logprobs=2)) for _ in range(3)]
    undisturbed.run(*requests)
    expected = {name: tokens for (name, _), tokens in undisturbed.tokens().items()}
    undisturbed.close()
    others = {token for each in requests[1:] for token in (*unpack_ids(each.token_ids), *expected[each.request_id])}
    unlucky, name = requests[0], requests[0].request_id
    fatal = next((token for token in expected[name] if token not in {*others, *unpack_ids(unlucky.token_ids)}), None)
    if fatal is None:
        pytest.skip("none of its tokens is its own")
    damaged = embedding.clone()
    damaged[fatal] = torch.nan
    pair = Pair(dataclasses.replace(model, weights=dataclasses.replace(model.weights, embedding=damaged)))
    pair.run(*requests)
    (failed,) = pair.of(Failed)
    assert (failed.request_id, failed.retryable) == (name, False)
    assert "no finite numbers" in failed.reason
    told = pair.tokens()
    assert told[name, 0] == expected[name][: expected[name].index(fatal) + 1]
    assert [told[each.request_id, 0] for each in requests[1:]] == [expected[each.request_id] for each in requests[1:]]
    pair.until_free()
    pair.close()


def test_failing_all_ends_running_offered_and_incoming_requests(pairs: Callable[..., Pair]) -> None:
    pair = pairs(max_batch=2)
    running, incoming, offered = request(), request(), request()
    pair.submit(running)
    pair.until_running()
    pair.hold_pulls()
    pair.submit(incoming, offered)
    pair.step()
    assert pair.decode.load().waiting == 2
    pair.decode.fail_all("the lane is gone")
    pair.deliver(pair.decode.flush())
    assert sorted((event.request_id, event.reason) for event in pair.of(Failed)) == sorted(
        (each.request_id, "the lane is gone") for each in (running, incoming, offered)
    )
    pair.release_pull()
    pair.wait_for_arrival()


def test_pages_of_a_failed_incoming_request_come_back_when_they_arrive(pair: Pair) -> None:
    pair.hold_pulls()
    pair.submit(request(9))
    pair.step()
    pair.decode.fail_all("the lane is gone")
    pair.release_pull()
    pair.wait_for_arrival()
    pair.step_decode()
    pair.until_free()


def test_a_failure_is_told_once(pair: Pair) -> None:
    pair.hold_pulls()
    pair.submit(request(9))
    pair.step()
    for _ in range(2):
        pair.decode.fail_all("the lane is gone")
    pair.deliver(pair.decode.flush())
    assert len(pair.of(Failed)) == 1
    pair.release_pull()
    pair.wait_for_arrival()


def test_a_message_for_someone_else_is_an_error(pair: Pair) -> None:
    with pytest.raises(WireError, match="PrefillRequest"):
        pair.decode.handle(request())
