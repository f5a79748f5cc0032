from __future__ import annotations

import io
import random

import pytest
from rich.console import Console

from ops.bench.soak import Sample, report_growth, theil_sen

MIB = 2**20


def judged(*memory: list[tuple[str, float]]) -> list[str]:
    """Each process as its (name, MiB) by sample."""
    samples = [
        Sample(
            5.0 * at,
            {(pid, each[at][0]): round(each[at][1] * MIB) for pid, each in enumerate(memory) if at < len(each)},
        )
        for at in range(max(map(len, memory)))
    ]
    return report_growth(samples, Console(file=io.StringIO()))


def test_memory_that_settles_is_flat() -> None:
    assert judged([("a", 100 + min(at, 50) + random.random()) for at in range(120)]) == []


def test_memory_that_keeps_growing_is_not() -> None:
    assert judged([("a", 100 + 0.1 * at + random.random()) for at in range(120)], [("b", 100.0)] * 120) == ["a"]


def test_a_process_is_watched_whatever_method_ray_calls_it_by() -> None:
    names = ["ray::Worker.status" if at % 40 == 7 else "ray::Worker" for at in range(120)]
    assert judged([(name, 100 + 0.1 * at) for at, name in enumerate(names)]) == ["ray::Worker"]


def test_a_process_that_ends_midway_is_told() -> None:
    assert judged([("a", 100.0)] * 120, [("b", 100.0)] * 60) == ["b, which ended midway"]


def test_spikes_do_not_move_the_slope() -> None:
    y = [10 * x for x in range(50)]
    for at in random.sample(range(50), 5):
        y[at] += 100_000
    assert theil_sen([float(x) for x in range(50)], y) == pytest.approx(10, abs=2)
