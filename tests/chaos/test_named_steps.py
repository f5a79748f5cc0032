"""A process dies at each named step of the protocol: no token is lost, repeated or changed, and nothing is left."""

from __future__ import annotations

import pytest

from ops.chaos.drawing import draw_schedule
from ops.chaos.schedule import Arm, Event, Kill, Scale, Target
from tests.chaos.conftest import Chaos
from tests.clusters import wait_until

SHRINK = (Scale(at_s=0.5, pool="experts", by=-1),)
GROW = (Scale(at_s=0.5, pool="experts", by=1),)
JOIN = (Scale(at_s=0.5, pool="decode", by=1),)
LOSE = (Kill(at_s=0.5, target="experts", which=0),)
SEEDS = (*range(18), 26, 31)
"""The last two kill the controller, one of them within a change."""


@pytest.mark.parametrize(
    ("target", "point", "after", "cause"),
    [
        # Neighbours in this list are of different pools: one is replaced while the next one is lost.
        ("decode", "dispatch", 5, ()),
        ("experts", "serve", 20, ()),
        ("prefill", "sampled", 1, ()),
        ("decode", "combine", 5, ()),
        ("experts", "prepare", 0, SHRINK),
        ("prefill", "handoff.send", 1, ()),
        ("decode", "sampled", 5, ()),
        ("experts", "retire", 0, SHRINK),
        ("prefill", "link", 0, GROW),
        ("decode", "handoff.receive", 1, ()),
        # The same step as above, seen from its other end.
        pytest.param("experts", "link", 0, JOIN, marks=pytest.mark.long),
        ("prefill", "combine", 1, ()),
        ("decode", "adopt", 0, SHRINK),
        # A second loss while the first one is dealt with.
        pytest.param("experts", "prepare", 0, LOSE, marks=pytest.mark.long),
        ("prefill", "adopt", 0, LOSE),
    ],
)
def test_a_process_may_die_at_a_named_step(
    chaos: Chaos, target: Target, point: str, after: int, cause: tuple[Event, ...]
) -> None:
    if cause:
        # What the test before has lost is replaced first: a change that is under way already would be the wrong one.
        wait_until(chaos.whole, 120, "every pool has its size")
    fault = Arm(at_s=0.2, target=target, which=1, point=point, after=after)
    verdict = chaos.run(fault, *cause)
    assert verdict.violations == ()
    (struck,) = [injected for injected in verdict.history.faults if injected.kind == fault.kind]
    assert struck.fired, struck.note


@pytest.mark.timeout(600)
def test_twenty_random_schedules_violate_nothing_and_leave_the_cluster_as_it_was(chaos: Chaos) -> None:
    verdicts = chaos.run_all([draw_schedule(seed, duration_s=1.0, num_faults=1) for seed in SEEDS])
    assert [(v.schedule.name, v.violations) for v in verdicts if v.violations] == []
    assert sum(fault.fired for verdict in verdicts for fault in verdict.history.faults) >= 15
