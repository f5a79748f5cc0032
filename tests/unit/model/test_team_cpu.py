from __future__ import annotations

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from model.team_cpu import Team, done, enter, leave, note, take, wait
from model.vectors_cpu import declare


@declare("void(i8[::1], i8, i8, i8[:,::1])")  # type: ignore[untyped-decorator]
def _double_then_sum(state: Any, turn: Any, leads: Any, numbers: Any) -> None:
    """Row 1 is twice row 0; then each block of row 2 is the sum of row 1, which needs all of its blocks."""
    if not enter(state, turn, leads):
        return
    count = numbers.shape[1]
    block = take(state, 0)
    while block < count:
        numbers[1, block] = 2 * numbers[0, block]
        block = done(state, 0)
    wait(state, 0, count)
    note(state, 0, leads)
    block = take(state, 1)
    while block < count:
        numbers[2, block] += numbers[1].sum()
        block = done(state, 1)
    wait(state, 1, count)
    note(state, 1, leads)
    leave(state, leads)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_block_is_computed_once_and_stages_follow_each_other(size: int) -> None:
    team = Team(size)
    for turn in range(300):
        numbers = np.zeros((3, 1 + turn % 40), np.int64)
        numbers[0] = np.random.default_rng().integers(0, 1000, numbers.shape[1])
        team.run(_double_then_sum, numbers)
        assert (numbers[1] == 2 * numbers[0]).all()
        assert (numbers[2] == 2 * numbers[0].sum()).all()


def test_no_blocks_are_no_work() -> None:
    Team(2).run(_double_then_sum, np.zeros((3, 0), np.int64))


@declare("void(i8[::1], i8, i8, f8[::1])")  # type: ignore[untyped-decorator]
def _dawdle(state: Any, turn: Any, leads: Any, numbers: Any) -> None:
    """The leader goes once a helper is there, who has some milliseconds of work behind its last block."""
    if not enter(state, turn, leads):
        return
    if leads:
        wait(state, 0, 1)
    else:
        done(state, 0)
        for _ in range(5_000_000):
            numbers[0] = numbers[0] * 0.999 + 1
        numbers[1] = 1
    leave(state, leads)


def test_whoever_is_inside_is_waited_for() -> None:
    """Its arrays are in use: nobody may write to them before, and the next call begins with counters of its own."""
    team = Team(2)
    for _ in range(3):
        numbers = np.zeros(2)
        team.run(_dawdle, numbers)
        assert numbers[1] == 1


@pytest.mark.parametrize("size", [1, 2])
def test_stages_are_timed_within_the_call(size: int) -> None:
    team, numbers = Team(size), np.ones((3, 5000), np.int64)
    begun_s = time.perf_counter()
    team.run(_double_then_sum, numbers)
    stages_s = team.stage_s(2)
    assert all(stage_s > 0 for stage_s in stages_s)
    assert sum(stages_s) < time.perf_counter() - begun_s


def test_helpers_end_with_their_team() -> None:
    before = set(threading.enumerate())
    team = Team(3)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    del team
    gc.collect()
    for helper in helpers:
        helper.join(20.0)
        assert not helper.is_alive()
