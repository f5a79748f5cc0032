from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.admission import AnswerLengths, Demand, peak_pages

PAGE = 4
demands = st.lists(
    st.builds(
        Demand,
        num_tokens=st.integers(8, 40),
        remaining=st.integers(1, 30),
        siblings=st.integers(0, 3),
        shared_pages=st.just(2),
    ),
    max_size=8,
)


def played_through(sequences: list[Demand]) -> int:
    """Step by step, each token in a page of its sequence, the shared ones once for all siblings."""
    most = 0
    for step in range(1, 31):
        there = [demand for demand in sequences if demand.remaining >= step]
        own = sum(-(-(demand.num_tokens + step) // PAGE) - demand.shared_pages for demand in there)
        most = max(most, own + 2 * len({demand.siblings for demand in there}))
    return most


@given(demands)
def test_the_peak_is_that_of_the_future_played_through(sequences: list[Demand]) -> None:
    assert peak_pages(sequences, PAGE) == played_through(sequences)


def test_who_ends_before_others_grow_is_not_counted_with_them() -> None:
    short = Demand(num_tokens=40, remaining=1, siblings="a", shared_pages=0)
    long = Demand(num_tokens=4, remaining=36, siblings="b", shared_pages=0)
    assert peak_pages([short, long], PAGE) == 11 + 2


def test_half_of_what_is_left_is_expected_before_anything_is_known() -> None:
    answers = AnswerLengths()
    assert (answers.remaining(0, 100), answers.remaining(60, 100)) == (50, 20)


def test_the_mean_of_answers_that_got_longer_is_expected() -> None:
    answers = AnswerLengths()
    for share in (10, 20, 40, 60):
        answers.note(share, 100)
    assert answers.remaining(1, 100) == round(130 / 4) - 1
    assert answers.remaining(20, 100) == 50 - 20
    assert answers.remaining(100, 1000) == round(1000 * 0.4) - 100


def test_an_answer_longer_than_any_before_may_get_as_long_as_allowed() -> None:
    answers = AnswerLengths()
    for _ in range(10):
        answers.note(5, 100)
    assert answers.remaining(5, 100) == 95


@pytest.mark.parametrize("num_tokens", [0, 99, 100])
def test_an_answer_that_goes_on_gets_at_least_a_token(num_tokens: int) -> None:
    answers = AnswerLengths()
    assert answers.remaining(num_tokens, 100) >= 1


def test_old_answers_are_forgotten() -> None:
    answers = AnswerLengths()
    for _ in range(200):
        answers.note(100, 100)
    for _ in range(200):
        answers.note(10, 100)
    assert answers.remaining(0, 100) == 10
