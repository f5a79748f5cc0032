from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling.stabilizer import NOTHING_YET, Stabilizer, act, note, propose, settle, undo
from octet.autoscaler_config import PoolScalingConfig

CONFIG = PoolScalingConfig(upscale_delay_s=30, downscale_delay_s=100, max_replicas=20)
COOLDOWN_S = 300.0


def told(wanted: list[int], every_s: float = 10.0, state: Stabilizer = NOTHING_YET) -> tuple[Stabilizer, float]:
    now_s = 0.0
    for number, count in enumerate(wanted):
        now_s = number * every_s
        state = note(state, now_s, count, CONFIG, COOLDOWN_S)
    return state, now_s


def target(wanted: list[int], current: int, every_s: float = 10.0) -> int:
    state, now_s = told(wanted, every_s)
    return propose(state, now_s, current, CONFIG, 0.0).target


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
        state = note(state, number * 10.0, 9 if number == 5 else 1, CONFIG, 0.0, 3 if number == 5 else 1)
    assert propose(state, 100.0, 9, CONFIG, 0.0).target == 3


def test_what_held_when_the_delay_began_counts_whenever_samples_come() -> None:
    assert target([3, 9, 9], 2, every_s=20.0) == 3


def test_memory_is_bounded_by_the_delays() -> None:
    state, _ = told([random.randrange(9) for _ in range(1000)])
    assert len(state.wanted) <= 32


def test_a_second_action_waits_for_the_first() -> None:
    state, now_s = told([5] * 10)
    state = act(state, now_s, 2, 5)
    assert propose(state, now_s, 2, CONFIG, 0.0, urgent=True).target == 2
    state, _ = settle(state, now_s + 10, 4, 1, 900)
    assert state.pending is not None
    state, _ = settle(state, now_s + 20, 5, 0, 900)
    assert state.pending is None


def grown() -> tuple[Stabilizer, float]:
    """A pool that has grown from 2 to 8, of which 5 and then 1 were wanted in the cooldown that is just over."""
    state, now_s = told([8] * 4)
    state, _ = settle(act(state, now_s, 2, 8), now_s, 8, 0, 900)
    for number in range(4, 34):
        now_s = number * 10.0
        state = note(state, now_s, 5 if number < 15 else 1, CONFIG, COOLDOWN_S)
    return state, now_s


def test_a_pool_that_has_grown_does_not_shrink_within_the_cooldown() -> None:
    state = act(NOTHING_YET, 0.0, 2, 8)
    state, _ = settle(state, 0.0, 8, 0, 900)
    for number in range(31):
        state = note(state, number * 10.0, 8, CONFIG, COOLDOWN_S, lasting=3)
    assert propose(state, 290.0, 8, CONFIG, COOLDOWN_S).target == 8
    assert propose(state, 300.0, 8, CONFIG, COOLDOWN_S).target == 3


def test_a_pool_that_turns_keeps_the_most_of_as_long_a_time_as_it_cannot_grow_again() -> None:
    state, now_s = grown()
    assert propose(state, now_s, 8, CONFIG, COOLDOWN_S).target == 8, "8 were wanted within the cooldown"
    targets = []
    current = 8
    for _ in range(70):
        now_s += 10
        state, _ = settle(note(state, now_s, 1, CONFIG, COOLDOWN_S), now_s, current, 0, 900)
        target = propose(state, now_s, current, CONFIG, COOLDOWN_S).target
        if target != current:
            state, current = act(state, now_s, current, target), target
            targets.append((now_s, target))
    # 8 were wanted until 40, 5 until 150; at 400, 240 s of the cooldown are left.
    assert targets == [(340.0, 5), (400.0, 1)]


def test_a_pool_that_turns_keeps_less_where_the_load_falls() -> None:
    state, now_s = grown()
    now_s += 40
    state = note(state, now_s, 1, CONFIG, COOLDOWN_S)
    # Of the 5 that were wanted until 220 s ago.
    for slope_per_s, target in ((0.01, 5), (-0.01, 3), (-0.1, 1)):
        assert propose(state, now_s, 8, CONFIG, COOLDOWN_S, slope_per_s=slope_per_s).target == target


@given(
    runs=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 30)), min_size=5, max_size=20),
    cooldown_s=st.sampled_from([50.0, 300.0]),
)
def test_unless_requests_miss_their_target_a_pool_turns_once_in_the_cooldown(
    runs: list[tuple[int, int]], cooldown_s: float
) -> None:
    wanted = [count for count, looks in runs for _ in range(looks)]
    state, current, moves = NOTHING_YET, 10, []
    for number, count in enumerate(wanted):
        now_s = number * 10.0
        state, _ = settle(note(state, now_s, count, CONFIG, cooldown_s), now_s, current, 0, 900)
        target = propose(state, now_s, current, CONFIG, cooldown_s).target
        if target != current:
            state = act(state, now_s, current, target)
            moves.append((now_s, target > current))
            current = target
    turns = [at_s for (_, was_up), (at_s, is_up) in itertools.pairwise(moves) if was_up != is_up]
    assert all(later - earlier >= cooldown_s for earlier, later in itertools.pairwise(turns))


def test_a_pool_whose_requests_miss_their_target_may_turn_back_at_once() -> None:
    state, now_s = grown()
    state, _ = settle(act(state, now_s, 8, 7), now_s, 7, 0, 900)
    for _ in range(4):
        now_s += 10
        state = note(state, now_s, 9, CONFIG, COOLDOWN_S)
    assert propose(state, now_s, 7, CONFIG, COOLDOWN_S).target == 7
    assert propose(state, now_s, 7, CONFIG, COOLDOWN_S, urgent=True).target == 9


def test_a_pool_that_shrinks_step_by_step_has_not_turned_and_may_grow_at_once() -> None:
    state, now_s, current = NOTHING_YET, 0.0, 8
    for smaller in (6, 4, 2):
        now_s += 10
        state, _ = settle(act(state, now_s, current, smaller), now_s, smaller, 0, 900)
        current = smaller
    for _ in range(4):
        now_s += 10
        state = note(state, now_s, 5, CONFIG, COOLDOWN_S)
    assert propose(state, now_s, current, CONFIG, COOLDOWN_S).target == 5


def test_a_change_that_was_refused_is_no_turn() -> None:
    """Or a pool whose growth no node has room for could not shrink for as long."""
    state, now_s = told([2] * 34)
    state, _ = settle(act(state, now_s - 1000, 3, 2), now_s, 2, 0, 900)
    before = state
    state = undo(act(state, now_s, 2, 5))
    assert state == before
    assert undo(state) == before, "nothing is under way"


def test_a_change_is_complete_when_nobody_starts_or_drains_any_more() -> None:
    state = act(NOTHING_YET, 0.0, 2, 1)
    state, _ = settle(state, 10.0, 1, 1, 900)
    assert state.pending is not None, "one is draining"
    state, _ = settle(state, 20.0, 1, 0, 900)
    assert state.pending is None


def test_a_change_that_takes_too_long_is_given_up_and_said_so() -> None:
    state = act(NOTHING_YET, 0.0, 2, 5)
    state, why = settle(state, 900.0, 4, 1, 900)
    assert (state.pending is not None, why) == (True, "")
    state, why = settle(state, 900.1, 4, 1, 900)
    assert state.pending is None
    assert "the change to 5 was given up" in why
