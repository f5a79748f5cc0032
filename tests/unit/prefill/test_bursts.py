"""A prompt that comes alone is kept waiting once at most, and a burst finds its first waiting from the second on."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from prefill.bursts import Bursts

APART_S = 0.001


def told(bursts: Bursts, sizes: Sequence[int], now_s: float) -> list[bool]:
    """What is expected when the first of each burst has come; they are a second apart."""
    expected = []
    for number, size in enumerate(sizes):
        arrival_s = now_s + number
        for index in range(size):
            bursts.note(arrival_s)
            arrival_s += random.uniform(0.0, 0.9) * APART_S
            if index == 0:
                expected.append(bursts.expected)
    return expected


def test_others_are_expected_of_the_first_prompt_that_ever_comes() -> None:
    assert told(Bursts(APART_S), [1], random.uniform(0, 1e4)) == [True]


def test_the_next_is_taken_for_what_the_last_was() -> None:
    sizes = [random.choice((1, 1, 2, 9)) for _ in range(200)]
    expected = told(Bursts(APART_S), sizes, random.uniform(0, 1e4))
    assert expected[1:] == [size > 1 for size in sizes[:-1]]


def test_a_second_one_tells_that_it_is_a_burst_after_all() -> None:
    bursts, now_s = Bursts(APART_S), random.uniform(0, 1e4)
    assert told(bursts, [1, 1], now_s) == [True, False]
    bursts.note(now_s + 1 + APART_S / 2)
    assert bursts.expected


@pytest.mark.parametrize(("gap", "together"), [(0.9, True), (1.1, False)])
def test_what_belongs_together_is_no_further_apart_than_told(gap: float, together: bool) -> None:
    bursts = Bursts(APART_S)
    for arrival_s in (100.0, 200.0, 200.0 + gap * APART_S):
        bursts.note(arrival_s)
    assert bursts.expected == together


def test_one_that_is_computed_again_belongs_to_whoever_came_before_it() -> None:
    bursts = Bursts(APART_S)
    for arrival_s in (100.0, 200.0, 150.0):
        bursts.note(arrival_s)
    assert bursts.expected
