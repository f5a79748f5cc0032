"""A full disk, a limit of memory and a clock that jumps, as events of schedules, in a cluster of the harness's own."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from ops.chaos.resources import may_limit_memory, why_no_small_disk
from ops.chaos.schedule import Event, FillDisk, JumpClock, Kill, LimitMemory, Schedule
from ops.chaos.wall_clock import why_no_wall_clock
from tests.alone import nothing_left
from tests.chaos import harness

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]
NO_DISK, NO_CLOCK = why_no_small_disk(), why_no_wall_clock()
_LONGEST_GAP_S = 10.0
"""Generous, for a slow machine: what each costs is printed."""


def faults_of(directory: pathlib.Path, *events: Event, duration_s: float = 6.0) -> list[dict[str, Any]]:
    with nothing_left() as marked:
        schedule = Schedule(duration_s=duration_s, events=events)
        told = harness.run(directory, [schedule], "--settle", "--users", "3", env=marked, timeout_s=300)
    # Of faults that were alone in their time.
    assert max((figure["gap_max_s"] for figure in told["figures"].values()), default=0.0) < _LONGEST_GAP_S
    (only,) = told["runs"]
    assert only["resumed"]["left"] > 0
    faults: list[dict[str, Any]] = only["faults"]
    assert [fault["fired"] for fault in faults] == [True] * len(events), faults
    return faults


@pytest.mark.skipif(not may_limit_memory(), reason="needs root, and the memory control group, version 1")
def test_members_that_the_kernel_kills_for_their_memory_cost_no_token(tmp_path: pathlib.Path) -> None:
    events = (LimitMemory(at_s=1.0, target="decode"), LimitMemory(at_s=5.0, target="experts"))
    assert [fault["note"] for fault in faults_of(tmp_path, *events)] == ["the kernel killed it"] * 2


@pytest.mark.skipif(bool(NO_DISK), reason=NO_DISK)
def test_a_member_that_is_lost_while_the_disk_is_full_costs_no_token(tmp_path: pathlib.Path) -> None:
    faults_of(tmp_path, FillDisk(at_s=1.0, for_s=4.0), Kill(at_s=2.0, target="decode"), duration_s=6.5)


@pytest.mark.skipif(bool(NO_CLOCK), reason=NO_CLOCK)
def test_a_cluster_whose_time_of_day_jumps_goes_on_and_replaces_who_is_lost(tmp_path: pathlib.Path) -> None:
    jumps = (JumpClock(at_s=1.0, by_s=7200.0, for_s=3.0), JumpClock(at_s=6.0, by_s=-7200.0))
    kills = (Kill(at_s=2.0, target="decode"), Kill(at_s=8.0, target="frontend"), Kill(at_s=8.5, target="controller"))
    faults = faults_of(tmp_path, *jumps, *kills, duration_s=10.0)
    jumped = [int(fault["note"].split()[1]) for fault in faults if fault["kind"].startswith("jump")]
    # Seven members, three services, and Ray's own helpers in Python.
    assert min(jumped) >= 10
