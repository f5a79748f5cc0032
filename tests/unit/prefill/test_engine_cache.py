"""The prefill engine with prompts whose beginning it has computed before, and with answers that are computed again."""

from __future__ import annotations

import dataclasses
import random

import pytest

from octet.ids import RequestId
from octet.messages import KvAck, PrefillRequest, TokenEvent, pack_ids, unpack_ids
from octet.request import Output
from tests.unit.embedded import PAGE, Model
from tests.unit.prefill.alone import DECODE, LAST_LAYER, Prefill, request


def again_of(asked: PrefillRequest, num_prompt_tokens: int, attempt: int = 1) -> PrefillRequest:
    """What computes an answer again, of which all but the prompt is known."""
    return dataclasses.replace(
        asked, request_id=RequestId("again"), num_prompt_tokens=num_prompt_tokens, attempt=attempt
    )


def followed_by(asked: PrefillRequest, num_tokens: int) -> PrefillRequest:
    more = [random.randrange(1000) for _ in range(num_tokens)]
    return dataclasses.replace(
        asked,
        request_id=RequestId("following"),
        token_ids=asked.token_ids + pack_ids(more),
        num_prompt_tokens=asked.num_tokens + num_tokens,
    )


def cached_tokens(prefill: Prefill) -> list[int]:
    return [event.cached_tokens for event in prefill.events(TokenEvent)]


def test_cached_tokens_are_counted(model: Model) -> None:
    prefill, asked = Prefill(model), request(2 * PAGE + 3)
    for name in ("a", "b", "c"):
        prefill.run(dataclasses.replace(asked, request_id=RequestId(name)))
    load = prefill.engine.load()
    assert (load.tokens, load.cached_tokens) == (2 * PAGE + 3 + 2 * 3, 2 * 2 * PAGE)
    assert cached_tokens(prefill) == [0, 2 * PAGE, 2 * PAGE]


def test_a_request_that_waits_for_pages_holds_none_of_those_that_are_cached(model: Model) -> None:
    """Else they would be given to nobody, and it would wait for ever."""
    prefill, asked = Prefill(model, num_pages=3), request(2 * PAGE + 1)
    prefill.run(asked)
    prefill.engine.handle(KvAck(lease_id=prefill.offers()[0].lease_id))
    prefill.step()
    prefill.run(request(1))
    prefill.engine.handle(dataclasses.replace(asked, request_id=RequestId("again")))
    for _ in range(3):
        assert not prefill.engine.busy
        prefill.step()
    assert (prefill.num_free, len(prefill.events(TokenEvent))) == (2, 2)
    prefill.engine.handle(KvAck(lease_id=prefill.offers()[1].lease_id))
    prefill.step()
    assert cached_tokens(prefill) == [0, 0, 2 * PAGE]


def test_the_log_probabilities_of_a_prompt_are_told_though_it_is_cached(model: Model) -> None:
    prefill, asked = Prefill(model), request(3 * PAGE, output=Output(logprobs=1, prompt_logprobs=True))
    prefill.run(asked)
    prefill.run(dataclasses.replace(asked, request_id=RequestId("again")))
    first, again = prefill.events(TokenEvent)
    assert len(first.prompt_logprobs) == 3 * PAGE
    assert again.prompt_logprobs == first.prompt_logprobs
    assert cached_tokens(prefill) == [0, 0]


def test_the_log_probabilities_of_a_long_prompt_are_those_of_its_parts(model: Model) -> None:
    asked = request(100, output=Output(logprobs=0, prompt_logprobs=True))
    told = []
    for chunk_tokens in (512, 17):
        prefill = Prefill(model, num_pages=32, chunk_tokens=chunk_tokens)
        prefill.run(asked)
        told.append(prefill.events(TokenEvent)[0].prompt_logprobs)
    whole, cut = told
    assert [entry.token_id for entry in whole] == [entry.token_id for entry in cut] == unpack_ids(asked.token_ids)
    assert [entry.logprob for entry in whole[1:]] == pytest.approx([entry.logprob for entry in cut[1:]], abs=1e-4)


def test_the_log_probabilities_of_a_prompt_are_not_told_again_with_an_answer_that_is(model: Model) -> None:
    prefill = Prefill(model)
    asked = request(3 * PAGE, output=Output(logprobs=0, prompt_logprobs=True))
    prefill.run(again_of(asked, 2 * PAGE))
    (event,) = prefill.events(TokenEvent)
    assert (event.prompt_logprobs, event.index) == ((), PAGE)
    assert prefill.routed.rows[LAST_LAYER] == [1]


def test_an_answer_that_is_computed_again_is_no_prompts_beginning(model: Model) -> None:
    """Its tokens attend one by one, and have other bits than those of a prompt."""
    prefill, asked = Prefill(model), request(4 * PAGE)
    prefill.run(again_of(asked, PAGE + 2))
    prefill.run(followed_by(asked, 3))
    assert cached_tokens(prefill) == [0, PAGE]


def test_a_prompt_is_no_part_of_an_answer_that_is_computed_again(model: Model) -> None:
    prefill, asked = Prefill(model), request(4 * PAGE)
    prefill.run(asked)
    prefill.run(again_of(asked, 2 * PAGE + 2))
    assert cached_tokens(prefill) == [0, 2 * PAGE]


def test_an_answer_that_is_computed_again_takes_no_more_than_the_budget(model: Model) -> None:
    prefill = Prefill(model, chunk_tokens=5)
    prefill.run(again_of(request(21), 6))
    assert prefill.routed.rows[1] == [5, 5, 5, 5, 1]


def test_running_streams_go_first_from_the_moment_that_a_prompt_has_come(model: Model) -> None:
    prefill = Prefill(model, beside=[DECODE], few_requests=1)
    assert not prefill.engine.gives_way
    prefill.engine.handle(request(5))
    assert prefill.engine.gives_way
    prefill.engine.handle(request(5))
    assert not prefill.engine.gives_way


def test_it_gathers_by_what_is_left_of_the_prompts_that_it_has_begun(model: Model) -> None:
    prefill, found = Prefill(model, chunk_tokens=8), list[bool]()
    prefill.engine.handle(request(20))
    for _ in range(3):
        found.append(prefill.engine.gathers)
        prefill.step()
    assert found == [False, False, True]
