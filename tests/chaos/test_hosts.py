"""A cluster on two hosts, between which the network fails: no token is lost, repeated or changed, and no ghost stays.

Hosts are network namespaces. Each test starts a Ray of two nodes of its own, in a process of its own.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from ops.chaos.cable import why_not
from ops.chaos.schedule import Cut, Event, Schedule, Slow, dump_schedule

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.timeout(460), pytest.mark.skipif(bool(REASON), reason=REASON)]

_RUN_S = 440.0
_LONGEST_GAP_S = 15.0
"""Generous, for a slow machine: what a cut costs is printed."""


def run(directory: pathlib.Path, *schedules: Schedule) -> list[dict[str, Any]]:
    """Under load, one after the other. Returns: what came of them; every promise was kept."""
    command = [
        sys.executable,
        "-m",
        "ops.cli",
        "chaos",
        "run",
        "--hosts",
        "2",
        "--json",
        str(directory / "report.json"),
    ]
    for schedule in schedules:
        file = directory / f"{schedule.name}.json"
        file.write_text(dump_schedule(schedule))
        command += ["--schedule", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_RUN_S, check=False)
    print(done.stdout)
    assert (directory / "report.json").exists(), done.stderr
    report = json.loads((directory / "report.json").read_text())
    assert [run["violations"] for run in report["runs"]] == [[]] * len(schedules), done.stdout
    assert done.returncode == 0
    gaps = [figure["gap_max_s"] for figure in report["figures"].values()]
    assert max(gaps) < _LONGEST_GAP_S, done.stdout
    runs: list[dict[str, Any]] = report["runs"]
    return runs


@pytest.mark.parametrize(
    "event",
    [
        # Until Ray takes the node for dead as well.
        Cut(at_s=1.0, way="both", for_s=15.0),
        # The node is there again before that, with what ran on it.
        Cut(at_s=1.0, way="both", for_s=4.0),
        Cut(at_s=1.0, way="to far", for_s=6.0),
        Cut(at_s=1.0, way="from far", for_s=6.0),
    ],
    ids=lambda event: f"{event.way} {event.for_s:g} s".replace(" ", "-"),
)
def test_streams_go_on_without_a_host_that_is_cut_off_and_its_ghosts_end(tmp_path: pathlib.Path, event: Cut) -> None:
    (only,) = run(tmp_path, Schedule(name="cut", duration_s=2.0, events=(event,)))
    (fault,) = only["faults"]
    lost = re.match(r"(.*) was lost; their processes ended", fault["note"])
    assert lost, fault["note"]
    assert {name.partition("-")[0] for name in lost[1].split(", ")} == {"prefill", "decode", "experts"}


def test_nobody_is_taken_for_lost_by_a_short_cut_or_a_slow_network(tmp_path: pathlib.Path) -> None:
    events: dict[str, Event] = {
        "short": Cut(at_s=0.5, way="both", for_s=0.5),
        "late": Slow(at_s=0.5, delay_s=0.05, for_s=4.0),
        "narrow": Slow(at_s=0.5, mbit_per_s=20.0, for_s=4.0),
    }
    schedules = [Schedule(name=name, duration_s=1.0, events=(event,)) for name, event in events.items()]
    for one in run(tmp_path, *schedules):
        assert [fault["note"] for fault in one["faults"]] == ["nobody was lost"]
