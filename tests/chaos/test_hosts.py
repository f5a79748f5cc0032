"""A cluster on two hosts, between which the network fails: no token is lost, repeated or changed, and no ghost stays.

Hosts are network namespaces. Each test starts a Ray of two nodes of its own, in a process of its own.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import pytest

from ops.chaos.cable import why_not
from ops.chaos.schedule import Cut, Event, KillNode, Schedule, Slow
from tests.chaos import harness

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.timeout(460), pytest.mark.skipif(bool(REASON), reason=REASON)]

_RUN_S = 440.0
_LONGEST_GAP_S = 15.0
"""Generous, for a slow machine: what a cut costs is printed."""


def run(directory: pathlib.Path, *schedules: Schedule, options: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Under load, one after the other. Returns: what came of them; every promise was kept."""
    report = harness.run(directory, schedules, "--hosts", "2", *options, env={}, timeout_s=_RUN_S)
    gaps = [figure["gap_max_s"] for figure in report["figures"].values()]
    assert max(gaps) < _LONGEST_GAP_S, report["figures"]
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


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
def test_streams_go_on_without_a_node_whose_raylet_was_killed(tmp_path: pathlib.Path, room: bool) -> None:
    schedule = Schedule(name="node", duration_s=3.0, events=(KillNode(at_s=1.0),))
    # Of decode workers that want most of a host, there is one on each.
    large = ("pools.decode.num_cpus=12", "pools.decode.threads=1")
    options = () if room else tuple(part for field in large for part in ("--set", field))
    (only,) = run(tmp_path, schedule, options=options)
    (fault,) = only["faults"]
    lost = re.match(r"(.*) was lost$", fault["note"])
    assert lost, fault["note"]
    assert "decode" in {name.partition("-")[0] for name in lost[1].split(", ")}
    assert only["no_room"] == (not room)
