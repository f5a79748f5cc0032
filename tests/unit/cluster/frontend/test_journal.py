from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.journal import Journal
from cluster.frontend.validation import Limits
from cluster.planning import make_plan
from decode.batch import DecodeBatch
from model.pages import PagePool
from octet.config import load_config
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import Evicted, KvOffer, PrefillRequest, TokenEvent, pack_ids, unpack_ids
from octet.request import Output, Sampling, Stopping

PROMPT = [5, 6, 7]


def request(*choices: int) -> PrefillRequest:
    return PrefillRequest(
        request_id=RequestId("r"),
        attempt=0,
        choices=choices,
        token_ids=pack_ids(PROMPT),
        num_prompt_tokens=len(PROMPT),
        sampling=Sampling(seed=3),
        stopping=Stopping(max_new_tokens=100),
        output=Output(),
        priority=0,
        arrival_s=1.0,
        decode_worker=WorkerId("decode-0"),
        frontend=WorkerId("frontend-0"),
    )


def token(index: int, token_id: int = 9, choice: int = 0, attempt: int = 0) -> TokenEvent:
    return TokenEvent(
        request_id=RequestId("r"), choice=choice, attempt=attempt, index=index, token_id=token_id, finish_reason=None
    )


def evicted(attempt: int, choice: int = 0) -> Evicted:
    return Evicted(request_id=RequestId("r"), choice=choice, attempt=attempt, reason="")


@pytest.fixture
def journal() -> Journal:
    """Choice 0 has tokens 10 and 11, choice 1 has token 20."""
    journal = Journal(request(0, 1))
    for event in (token(0, 10), token(1, 11), token(0, 20, choice=1)):
        assert journal.commit(event)
    return journal


def test_the_next_token_of_the_live_attempt_is_committed(journal: Journal) -> None:
    assert journal.commit(token(2, 12))
    assert journal.token_ids(0) == [10, 11, 12]


@pytest.mark.parametrize(
    "event",
    [token(1, 11), token(3), token(0, 10), token(2, attempt=1), token(2, attempt=-1)],
    ids=["duplicate", "gap", "old duplicate", "attempt to come", "attempt before"],
)
def test_any_other_token_is_dropped(journal: Journal, event: TokenEvent) -> None:
    assert not journal.commit(event)
    assert journal.token_ids(0) == [10, 11]


def test_choices_are_committed_independently(journal: Journal) -> None:
    assert journal.commit(token(1, 21, choice=1))
    assert (journal.token_ids(0), journal.token_ids(1)) == ([10, 11], [20, 21])


def test_a_choice_that_ended_takes_no_token(journal: Journal) -> None:
    journal.end(0)
    assert not journal.commit(token(2))


def test_a_request_has_ended_when_every_choice_has(journal: Journal) -> None:
    journal.end(0)
    assert (journal.ended, journal.live_choices()) == (False, [1])
    journal.end(1)
    assert (journal.ended, journal.live_choices()) == (True, [])


def test_completion_tokens_are_counted_over_all_choices(journal: Journal) -> None:
    assert journal.num_completion_tokens == 3


def test_an_evicted_choice_is_asked_for_again_with_what_was_committed(journal: Journal) -> None:
    again = journal.restart(evicted(0))
    assert again is not None
    assert (again.choices, again.attempt, unpack_ids(again.token_ids)) == ((0,), 1, [*PROMPT, 10, 11])


def test_a_restart_changes_nothing_else_of_the_request(journal: Journal) -> None:
    again = journal.restart(evicted(0))
    assert again is not None
    assert dataclasses.replace(again, choices=(0, 1), attempt=0, token_ids=pack_ids(PROMPT)) == request(0, 1)


def test_after_a_restart_the_old_attempt_is_stale(journal: Journal) -> None:
    journal.restart(evicted(0))
    assert not journal.commit(token(2, attempt=0))
    assert journal.commit(token(2, attempt=1))


def test_a_restart_leaves_other_choices_alone(journal: Journal) -> None:
    journal.restart(evicted(0))
    assert (journal.attempt(1), journal.commit(token(1, choice=1))) == (0, True)


def test_choices_with_the_same_tokens_are_computed_again_together() -> None:
    journal = Journal(request(0, 1, 2))
    journal.commit(token(0, 10, choice=1))
    again = journal.compute_again([0, 1, 2])
    assert [(each.choices, unpack_ids(each.token_ids)) for each in again] == [((0, 2), PROMPT), ((1,), [*PROMPT, 10])]


PAGE = 4


def limits(decode_pages: int) -> Limits:
    plan = make_plan(load_config(None, [f"kv.page_size={PAGE}"]))
    return Limits(
        config=plan.config,
        model=plan.model,
        generation=plan.generation,
        max_model_len=decode_pages * PAGE,
        decode_pages=decode_pages,
    )


LIMITS = [limits(decode_pages) for decode_pages in range(1, 13)]


@given(st.data(), st.sampled_from(LIMITS), st.integers(1, 6), st.sampled_from([0, 1]))
def test_an_empty_decode_worker_takes_every_request_that_computes_choices_again(
    data: st.DataObject, limits: Limits, n: int, lookahead: int
) -> None:
    """Each choice once, with those of the same tokens, as many together as fit."""
    prompt = range(data.draw(st.integers(1, limits.max_model_len)))
    answers = data.draw(st.lists(st.integers(0, limits.max_model_len - len(prompt)), min_size=n, max_size=n))
    first = dataclasses.replace(request(*range(n)), token_ids=pack_ids(prompt), num_prompt_tokens=len(prompt))
    journal = Journal(first, limits.most_choices)
    for choice, length in enumerate(answers):
        for index in range(length):
            assert journal.commit(token(index, choice=choice))
    again = journal.compute_again(range(n))
    assert sorted(choice for each in again for choice in each.choices) == list(range(n))
    assert len({each.attempt for each in again}) == len(again)
    for each in again:
        assert {each.num_tokens - len(prompt)} == {answers[choice] for choice in each.choices}
        batch = DecodeBatch(PagePool(limits.decode_pages, PAGE), 6, lookahead)
        assert batch.reserve(offer(each), []) is not None
    for one, other in itertools.combinations(again, 2):
        if one.num_tokens == other.num_tokens:
            num_pages = -(-one.num_tokens // PAGE)
            assert num_pages + len(one.choices) + len(other.choices) - 1 > limits.decode_pages


def offer(request: PrefillRequest) -> KvOffer:
    return KvOffer(
        lease_id=LeaseId("0"),
        source=WorkerId("prefill-0"),
        request=request,
        next_tokens=(9,) * len(request.choices),
        lease_s=60.0,
    )


def test_no_two_requests_share_an_attempt(journal: Journal) -> None:
    attempts = [each.attempt for each in (*journal.compute_again([0, 1]), *journal.compute_again([0]))]
    assert len({0, *attempts}) == 4


def test_an_eviction_told_twice_restarts_once(journal: Journal) -> None:
    assert journal.restart(evicted(0)) is not None
    assert journal.restart(evicted(0)) is None


def test_an_eviction_of_a_choice_that_ended_restarts_nothing(journal: Journal) -> None:
    journal.end(0)
    assert journal.restart(evicted(0)) is None


def test_only_the_live_attempt_of_a_choice_is_live(journal: Journal) -> None:
    journal.restart(evicted(0))
    journal.end(1)
    assert [journal.is_live(0, 0), journal.is_live(0, 1), journal.is_live(1, 0)] == [False, True, False]


@given(
    st.lists(
        st.one_of(
            st.builds(
                token, st.integers(0, 6), st.integers(0, 99), choice=st.integers(0, 1), attempt=st.integers(0, 2)
            ),
            st.builds(evicted, st.integers(0, 2), choice=st.integers(0, 1)),
        )
    )
)
def test_whatever_arrives_each_index_is_committed_once_and_in_order(events: list[TokenEvent | Evicted]) -> None:
    journal = Journal(request(0, 1))
    committed: list[TokenEvent] = []
    for event in events:
        if isinstance(event, Evicted):
            journal.restart(event)
        elif journal.commit(event):
            committed.append(event)
    for choice in (0, 1):
        mine = [event for event in committed if event.choice == choice]
        assert [event.index for event in mine] == list(range(len(mine)))
        assert [event.attempt for event in mine] == sorted(event.attempt for event in mine)
        assert journal.token_ids(choice) == [event.token_id for event in mine]
