from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.admission import Backlog, Demand, Rates, Refusal, admit
from cluster.frontend.load_meter import LoadMeter
from octet.config import FrontendConfig

IDLE = Backlog(requests=0, prompt_tokens=0, prompt_tokens_ahead=0, new_tokens=0)
RATES = Rates(prefill_tokens_s=1000.0, decode_tokens_s=100.0, tpot_s=0.1)
UNKNOWN = Rates(prefill_tokens_s=None, decode_tokens_s=None, tpot_s=None)
CONFIG = FrontendConfig(max_requests=10, max_queued_tokens=1000, reserve=0.2)


def demand(priority: int = 0, prompt_tokens: int = 10, timeout_s: float = 100.0, new_tokens: int = 0) -> Demand:
    return Demand(
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        longest_answer=new_tokens,
        priority=priority,
        timeout_s=timeout_s,
    )


def backlog(**fields: Any) -> Backlog:
    return dataclasses.replace(IDLE, **fields)


def refused(demand: Demand, backlog: Backlog, rates: Rates = RATES) -> Refusal:
    refusal = admit(demand, backlog, rates, CONFIG)
    assert refusal is not None
    return refusal


@pytest.mark.parametrize("rates", [RATES, UNKNOWN])
@pytest.mark.parametrize("priority", [-1, 0, 1])
def test_an_idle_cluster_refuses_nobody(rates: Rates, priority: int) -> None:
    huge = demand(priority, prompt_tokens=10**9, new_tokens=10**9, timeout_s=0.001)
    assert admit(huge, IDLE, rates, CONFIG) is None


@pytest.mark.parametrize(("priority", "most"), [(-3, 10), (0, 8), (5, 6)])
def test_each_class_has_its_share_of_the_requests(priority: int, most: int) -> None:
    assert admit(demand(priority), backlog(requests=most - 1), RATES, CONFIG) is None
    refusal = refused(demand(priority), backlog(requests=most))
    assert f"the limit (frontend.max_requests) is {most} at priority {priority}" in refusal.reason


@pytest.mark.parametrize(("priority", "most"), [(-3, 1000), (0, 800), (5, 600)])
def test_each_class_has_its_share_of_the_queued_tokens(priority: int, most: int) -> None:
    waiting = backlog(prompt_tokens=most - 10)
    assert admit(demand(priority, prompt_tokens=10), waiting, RATES, CONFIG) is None
    refusal = refused(demand(priority, prompt_tokens=11), waiting)
    assert f"the limit (frontend.max_queued_tokens) is {most}" in refusal.reason


@pytest.mark.parametrize(
    ("ahead", "wait_s"),
    [({"prompt_tokens_ahead": 20_000}, 20.0), ({"new_tokens": 3000.0}, 30.0)],
    ids=["for prompts", "for answers"],
)
def test_what_would_wait_past_its_deadline_is_refused(ahead: dict[str, Any], wait_s: float) -> None:
    assert admit(demand(-1, timeout_s=wait_s + 0.1), backlog(**ahead), RATES, CONFIG) is None
    refusal = refused(demand(-1, timeout_s=wait_s - 0.5), backlog(**ahead))
    assert f"it would wait {wait_s:.1f} s" in refusal.reason
    assert refusal.retry_after_s == pytest.approx(0.51)


@pytest.mark.parametrize(("new_tokens", "allowed_s"), [(0, 19.99), (100, 9.99), (10**6, 10.0)])
def test_its_own_time_counts_up_to_a_half(new_tokens: int, allowed_s: float) -> None:
    asked = demand(-1, timeout_s=20.0, new_tokens=new_tokens)
    assert admit(asked, backlog(new_tokens=100 * allowed_s - 1), RATES, CONFIG) is None
    assert "it would wait" in refused(asked, backlog(new_tokens=100 * allowed_s + 2)).reason


def test_answers_count_as_far_as_they_are_expected_to_go() -> None:
    asked = demand(-1, timeout_s=20.0, new_tokens=100)
    assert admit(asked, backlog(new_tokens=1500.0, answer_share=0.1), RATES, CONFIG) is None


def test_the_slower_pool_is_what_is_waited_for() -> None:
    both = backlog(prompt_tokens_ahead=20_000, new_tokens=3000.0)
    assert "it would wait 30.0 s" in refused(demand(timeout_s=10), both).reason


def test_before_anything_is_measured_only_the_limits_count() -> None:
    assert admit(demand(timeout_s=0.1), backlog(prompt_tokens_ahead=10**6, new_tokens=1e6), UNKNOWN, CONFIG) is None
    assert refused(demand(), backlog(requests=10), UNKNOWN).retry_after_s == 1.0


@given(
    requests=st.integers(0, 12),
    tokens=st.integers(0, 1500),
    new_tokens=st.floats(0, 1e5),
    timeout_s=st.floats(0.01, 600),
)
def test_whoever_is_refused_so_is_everybody_less_important(
    requests: int, tokens: int, new_tokens: float, timeout_s: float
) -> None:
    found = backlog(requests=requests, prompt_tokens=tokens, prompt_tokens_ahead=tokens, new_tokens=new_tokens)
    refusals = [admit(demand(p, timeout_s=timeout_s), found, RATES, CONFIG) for p in (-1, 0, 1)]
    assert [r is not None for r in refusals] == sorted(r is not None for r in refusals)
    assert all(0.1 <= r.retry_after_s <= 60 for r in refusals if r is not None)


@given(
    places=st.integers(0, 4),
    choices=st.integers(1, 4),
    new_tokens=st.floats(0, 1e6),
    answer=st.integers(1, 10_000),
    timeout_s=st.floats(0.01, 600),
)
def test_whoever_has_a_place_does_not_wait_for_longer_answers_than_its_own(
    places: int, choices: int, new_tokens: float, answer: int, timeout_s: float
) -> None:
    asked = dataclasses.replace(demand(-1, timeout_s=timeout_s, new_tokens=answer), choices=choices, prompt_tokens=0)
    refusal = admit(asked, backlog(new_tokens=new_tokens, free_places=places), RATES, CONFIG)
    others_s, own_s = new_tokens / 100, answer * 0.1
    waits_s = min(others_s, own_s) if choices <= places else others_s
    assert (refusal is not None) == (waits_s > max(0.0, timeout_s - min(own_s, timeout_s / 2)))


def test_one_long_answer_keeps_nobody_out() -> None:
    """At thirty tokens a second, with a thousand seconds to go."""
    long, now_s, meter = dataclasses.replace(demand(new_tokens=32_768), prompt_tokens=200), 0.0, LoadMeter()
    meter.accept(long, now_s)
    meter.prefilled(long, 0.2)
    for number in range(600):
        now_s = 0.2 + number / 30
        meter.generated(now_s, 1 / 30 if number else None)
    short = demand(timeout_s=20.0, new_tokens=100)
    assert admit(short, meter.backlog(0, free_places=63), meter.rates, FrontendConfig()) is None
    full = admit(short, meter.backlog(0, free_places=0), meter.rates, FrontendConfig())
    assert full is not None, "where it has to wait for a place, that may take long"


def test_whoever_comes_too_much_is_told_when_the_next_request_may_be_done() -> None:
    full = backlog(requests=8, new_tokens=4000.0)
    assert refused(demand(), full).retry_after_s == pytest.approx(40.0 / 8)


def test_a_prompt_that_is_too_much_is_told_when_so_many_tokens_may_be_computed() -> None:
    waiting = backlog(prompt_tokens=800, prompt_tokens_ahead=20_000)
    assert refused(demand(prompt_tokens=100), waiting).retry_after_s == pytest.approx(20.0 * 100 / 800)
