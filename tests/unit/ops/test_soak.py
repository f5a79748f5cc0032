from __future__ import annotations

import io
import os
import pathlib
import random
import shutil
import subprocess

import pytest
from rich.console import Console

from ops.bench.changes.leftovers import actor_processes
from ops.bench.soak import Sample, family_memory, report_growth, theil_sen
from ops.chaos.observe import name_of, state_of

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


def test_a_process_whose_name_and_arguments_are_no_text_is_one_like_others(tmp_path: pathlib.Path) -> None:
    program = tmp_path / os.fsdecode(b"\xff\xfe")
    program.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([b"\xff\xfe", b"30"], executable=program) as process:
        try:
            memory = family_memory()
            assert actor_processes().keys().isdisjoint([process.pid])
            assert state_of(process.pid)
            assert name_of(process.pid) == "\N{REPLACEMENT CHARACTER}" * 2
        finally:
            process.kill()
    assert process.pid in {pid for pid, _ in memory}
