"""A process dies at each named step of the protocol: no token is lost, repeated or changed, and nothing is left."""

from __future__ import annotations

import pytest

from ops.chaos.drawing import draw_schedule
from ops.chaos.schedule import Arm, Event, Kill, Scale, Target
from tests.chaos.conftest import Chaos

SHRINK = (Scale(at_s=0.5, pool="experts", by=-1),)
GROW = (Scale(at_s=0.5, pool="experts", by=1),)
LOSE = (Kill(at_s=0.5, target="experts", which=0),)


@pytest.mark.parametrize(
    ("target", "point", "after", "cause"),
    [
        ("decode", "dispatch", 5, ()),
        ("decode", "combine", 5, ()),
        ("prefill", "combine", 1, ()),
        ("experts", "serve", 20, ()),
        ("prefill", "sampled", 1, ()),
        ("decode", "sampled", 5, ()),
        ("prefill", "handoff.send", 1, ()),
        ("decode", "handoff.receive", 1, ()),
        ("experts", "prepare", 0, SHRINK),
        ("decode", "adopt", 0, SHRINK),
        ("experts", "retire", 0, SHRINK),
        ("prefill", "link", 0, GROW),
        # A second loss while the first one is dealt with.
        ("experts", "prepare", 0, LOSE),
        ("prefill", "adopt", 0, LOSE),
    ],
)
def test_a_process_may_die_at_a_named_step(
    chaos: Chaos, target: Target, point: str, after: int, cause: tuple[Event, ...]
) -> None:
    fault = Arm(at_s=0.2, target=target, which=1, point=point, after=after)
    verdict = chaos.run(fault, *cause)
    assert verdict.violations == ()
    (struck,) = [injected for injected in verdict.history.faults if injected.kind == fault.kind]
    assert struck.fired, struck.note


def test_twenty_random_schedules_violate_nothing_and_leave_the_cluster_as_it_was(chaos: Chaos) -> None:
    verdicts = chaos.run_all([draw_schedule(seed, duration_s=1.2) for seed in range(20)])
    assert [(v.schedule.name, v.violations) for v in verdicts if v.violations] == []
    assert sum(fault.fired for verdict in verdicts for fault in verdict.history.faults) > 20
