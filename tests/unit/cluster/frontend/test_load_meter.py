from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.admission import Demand
from cluster.frontend.load_meter import LoadMeter, Rate
from cluster.frontend.request_meter import _MOST_KEPT, RequestMeter
from cluster.frontend.slo import Slo


def demand(priority: int = 0, prompt_tokens: int = 100, new_tokens: int = 20) -> Demand:
    return Demand(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        longest_answer=new_tokens,
        priority=priority,
        timeout_s=10.0,
    )


def test_a_rate_is_work_per_busy_second() -> None:
    rate, now_s = Rate(), 100.0
    for _ in range(5):
        rate.note(now_s, 0, True)
        for _ in range(10):
            now_s += 0.1
            rate.note(now_s, 7, True)
        rate.note(now_s, 0, False)
        now_s += 50.0
    assert rate.per_s == pytest.approx(70.0)


def test_a_rate_is_unknown_before_there_was_enough_to_do() -> None:
    rate = Rate()
    rate.note(0.0, 0, True)
    rate.note(0.9, 50, True)
    assert rate.per_s is None


def test_a_rate_follows_what_it_has_become() -> None:
    rate, now_s = Rate(), 0.0
    rate.note(now_s, 0, True)
    for each in [10] * 100 + [1] * 500:
        now_s += 0.1
        rate.note(now_s, each, True)
    assert rate.per_s == pytest.approx(10.0, rel=0.1)


def test_what_is_ahead_is_what_is_at_least_as_important() -> None:
    meter = LoadMeter()
    for priority, tokens in ((-5, 1), (0, 10), (3, 100)):
        meter.accept(demand(priority, tokens), 0.0)
    assert [meter.backlog(p).prompt_tokens_ahead for p in (-1, 0, 1)] == [1, 11, 111]
    assert [meter.backlog(p).prompt_tokens for p in (-1, 0, 1)] == [111] * 3


def test_rates_are_those_of_each_pool() -> None:
    meter, asked = LoadMeter(), demand()
    meter.accept(asked, 0.0)
    meter.prefilled(asked, 2.0)
    for index in range(20):
        meter.generated(2.0 + (index + 1) * 0.1, 0.1 if index else None)
    rates = meter.rates
    assert rates.prefill_tokens_s == pytest.approx(50.0)
    assert rates.decode_tokens_s == pytest.approx(10.0)
    assert rates.tpot_s == pytest.approx(0.1)


def test_answers_are_expected_to_be_as_long_as_they_were() -> None:
    meter = LoadMeter()
    for _ in range(200):
        asked = demand(new_tokens=100)
        meter.accept(asked, 0.0)
        meter.prefilled(asked, 0.0)
        for _ in range(25):
            meter.generated(0.0, None)
        meter.end(asked, 25, prefilled=True, finished=True, now_s=0.0)
    meter.accept(demand(new_tokens=1000), 0.0)
    assert meter.backlog(0).new_tokens == pytest.approx(250.0, rel=0.01)


@given(st.lists(st.tuples(st.integers(-1, 1), st.integers(0, 20), st.booleans()), max_size=20))
def test_when_every_request_has_ended_nothing_is_in_hand(asked: list[tuple[int, int, bool]]) -> None:
    meter = LoadMeter()
    for number, (priority, generated, finished) in enumerate(asked):
        each, now_s = demand(priority), float(number)
        meter.accept(each, now_s)
        if generated:
            meter.prefilled(each, now_s)
        for _ in range(generated):
            meter.generated(now_s, None)
        meter.end(each, generated, prefilled=generated > 0, finished=finished, now_s=now_s)
    found = meter.backlog(1)
    assert (found.requests, found.prompt_tokens, found.prompt_tokens_ahead, found.new_tokens) == (0, 0, 0, 0)


def test_time_in_which_nothing_is_decoded_does_not_slow_the_rate() -> None:
    """Else whoever comes after a pause would be refused for want of time."""
    meter, now_s, one = LoadMeter(), 0.0, demand(new_tokens=200)
    for _ in range(3):
        meter.accept(one, now_s)
        meter.prefilled(one, now_s)
        for number in range(200):
            now_s += 0.02
            meter.generated(now_s, 0.02 if number else None)
        meter.end(one, 200, prefilled=True, finished=True, now_s=now_s)
        now_s += 100.0
    assert meter.rates.decode_tokens_s == pytest.approx(50.0)


def test_of_more_requests_than_are_kept_the_rate_is_that_of_the_last() -> None:
    meter = RequestMeter(Slo(ttft_s=1.0, ttft_per_1k_tokens_s=0.0, tpot_s=1.0), 30.0)
    # 1000 requests a second, of which the last four seconds are kept.
    for number in range(3 * _MOST_KEPT):
        meter.arrived(number / 1000, 20, 10)
    load = meter.load(3 * _MOST_KEPT / 1000, 0.0, 0)
    assert load.arriving_prompt_tokens_per_s == pytest.approx(10_000, rel=0.01)
