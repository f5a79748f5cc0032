from __future__ import annotations

import random

import pytest

from cluster.stabilizer import NOTHING_YET, Stabilizer, act, note, propose, settle
from octet.autoscaler_config import PoolScalingConfig

CONFIG = PoolScalingConfig(upscale_delay_s=30, downscale_delay_s=100, max_replicas=20)


def told(wanted: list[int], every_s: float = 10.0, state: Stabilizer = NOTHING_YET) -> tuple[Stabilizer, float]:
    now_s = 0.0
    for number, count in enumerate(wanted):
        now_s = number * every_s
        state = note(state, now_s, count, CONFIG)
    return state, now_s


def target(wanted: list[int], current: int, every_s: float = 10.0) -> int:
    state, now_s = told(wanted, every_s)
    return propose(state, now_s, current, CONFIG, 0.0, False).target


@pytest.mark.parametrize(
    ("wanted", "becomes"),
    [
        ([5] * 3, 2),
        ([5] * 4, 5),
        ([5, 9, 4, 7], 4),
        ([5, 2, 5, 5], 2),
        ([1] * 10, 2),
        ([1] * 11, 1),
        ([2] + [1] * 10, 2),
        ([2] + [1] * 11, 1),
    ],
    ids=["early", "up", "up: the least", "interrupted", "down: early", "down", "down: the most", "forgotten"],
)
def test_a_pool_grows_to_the_least_and_shrinks_to_the_most_of_its_delays(wanted: list[int], becomes: int) -> None:
    assert target(wanted, 2) == becomes


def test_a_pool_shrinks_to_the_most_that_was_wanted_lastingly() -> None:
    state = NOTHING_YET
    for number in range(11):
        state = note(state, number * 10.0, 9 if number == 5 else 1, CONFIG, 3 if number == 5 else 1)
    assert propose(state, 100.0, 9, CONFIG, 0.0, False).target == 3


def test_what_held_when_the_delay_began_counts_whenever_samples_come() -> None:
    assert target([3, 9, 9], 2, every_s=20.0) == 3


def test_memory_is_bounded_by_the_delays() -> None:
    state, _ = told([random.randrange(9) for _ in range(1000)])
    assert len(state.wanted) <= 12


def test_a_second_action_waits_for_the_first() -> None:
    state, now_s = told([5] * 10)
    state = act(state, now_s, 2, 5)
    assert propose(state, now_s, 2, CONFIG, 0.0, True).target == 2
    state, _ = settle(state, now_s + 10, 4, 1, 900)
    assert state.pending is not None
    state, _ = settle(state, now_s + 20, 5, 0, 900)
    assert state.pending is None


def test_a_direction_is_reversed_at_most_once_in_the_cooldown() -> None:
    state, now_s = told([5] * 4)
    state = act(state, now_s, 2, 5)
    state, _ = settle(state, now_s, 5, 0, 900)
    for number in range(4, 40):
        state = note(state, number * 10.0, 1, CONFIG)
    assert propose(state, 390.0, 5, CONFIG, 600.0, False).target == 5, "it grew a moment ago"
    assert propose(state, 390.0, 5, CONFIG, 300.0, False).target == 1
    state, _ = settle(act(state, 390.0, 5, 1), 390.0, 1, 0, 900)
    for number in range(40, 50):
        state = note(state, number * 10.0, 6, CONFIG)
    assert propose(state, 490.0, 1, CONFIG, 300.0, False).target == 1
    assert propose(state, 490.0, 1, CONFIG, 300.0, True).target == 6, "requests that miss their target do not wait"
    assert propose(note(state, 1000.0, 6, CONFIG), 1000.0, 1, CONFIG, 300.0, False).target == 6
