"""Parts of a lap are exclusive, and add up to it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest

from ops.bench.breakdown.stopwatch import REST, Lap, Stopwatch


class Clock:
    """Stands still but for `pass_s`."""

    def __init__(self) -> None:
        self.now_s, self.cpu_s = 100.0, 7.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float, running_s: float | None = None) -> None:
        self.now_s += seconds
        self.cpu_s += seconds if running_s is None else running_s

    def cpu(self) -> float:
        return self.cpu_s


def lap_of(stopwatch: Stopwatch) -> Lap:
    lap = stopwatch.lap()
    assert lap is not None
    return lap


def test_a_moment_belongs_to_the_innermost_part() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)
    inner = stopwatch.wrap(lambda: clock.pass_s(2.0), "inner")

    def work() -> None:
        clock.pass_s(1.0)
        inner()
        clock.pass_s(0.5)

    stopwatch.lap()
    clock.pass_s(0.25)
    stopwatch.wrap(work, "outer")()
    lap = lap_of(stopwatch)
    assert lap.parts == pytest.approx({REST: 0.25, "outer": 1.5, "inner": 2.0})
    assert lap.total_s == pytest.approx(3.75)


def test_parts_add_up_to_the_lap_however_calls_nest() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)

    def nest(depth: int) -> None:
        clock.pass_s(random.random())
        for _ in range(random.randrange(3) if depth else 0):
            step(depth - 1)
        clock.pass_s(random.random())

    def step(depth: int) -> None:
        stopwatch.wrap(nest, random.choice("abc"))(depth)

    stopwatch.lap()
    for _ in range(20):
        step(3)
        lap = lap_of(stopwatch)
        assert sum(lap.parts.values()) == pytest.approx(lap.total_s)


def test_a_lap_begins_where_the_one_before_ended() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)
    assert stopwatch.lap() is None
    clock.pass_s(1.0)
    first = lap_of(stopwatch)
    clock.pass_s(2.0)
    second = lap_of(stopwatch)
    assert first.stop_s == second.start_s
    assert second.parts == {REST: 2.0}


def test_a_part_ends_with_an_exception() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)

    def fail() -> None:
        clock.pass_s(1.0)
        raise KeyError

    stopwatch.lap()
    with pytest.raises(KeyError):
        stopwatch.wrap(fail, "part")()
    clock.pass_s(2.0)
    assert lap_of(stopwatch).parts == {"part": 1.0, REST: 2.0}


def test_other_threads_are_not_charged() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)
    wrapped: Callable[[float], None] = stopwatch.wrap(clock.pass_s, "part")
    stopwatch.lap()
    other = threading.Thread(target=wrapped, args=(1.0,))
    other.start()
    other.join()
    assert lap_of(stopwatch).parts == {REST: 1.0}


def test_time_without_a_core_is_told_apart() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)
    stopwatch.lap()
    stopwatch.wrap(lambda: clock.pass_s(3.0, running_s=1.0), "part")()
    clock.pass_s(1.0)
    assert lap_of(stopwatch).running == pytest.approx({"part": 1.0, REST: 1.0})


def test_a_part_may_be_divided_afterwards() -> None:
    clock = Clock()
    stopwatch = Stopwatch(clock, clock.cpu)
    stopwatch.lap()
    stopwatch.wrap(lambda: clock.pass_s(5.0, running_s=4.0), "half")()
    stopwatch.divide("half", [("norm", 1.0), ("linear", 2.0), ("norm", 0.5)])
    lap = lap_of(stopwatch)
    assert lap.parts == pytest.approx({REST: 0.0, "half": 1.5, "norm": 1.5, "linear": 2.0})
    assert sum(lap.parts.values()) - sum(lap.running.values()) == pytest.approx(1.0)
