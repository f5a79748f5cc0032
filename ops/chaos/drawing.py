"""Schedules drawn at random. The same seed is the same schedule. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from octet.faults import Action
from ops.chaos.schedule import DURATION_S, Arm, Event, Kill, PoolName, Rebalance, Scale, Schedule, Stop, Target

_STEPS: tuple[tuple[str, Target, bool], ...] = (
    ("dispatch", "decode", False),
    ("dispatch", "prefill", False),
    ("combine", "decode", False),
    ("combine", "prefill", False),
    ("serve", "experts", False),
    ("sampled", "decode", False),
    ("sampled", "prefill", False),
    ("handoff.send", "prefill", False),
    ("handoff.receive", "decode", False),
    ("link", "experts", True),
    ("link", "decode", True),
    ("prepare", "experts", True),
    ("adopt", "decode", True),
    ("adopt", "prefill", True),
    ("retire", "experts", True),
    ("commit", "frontend", False),
    ("change.linked", "controller", True),
    ("change.prepared", "controller", True),
    ("change.adopted", "controller", True),
)
"""Named steps, and whether they are reached only while the cluster changes."""
SERVICES: tuple[Target, ...] = ("router", "frontend", "controller")
"""Those outside the pools."""
_POOLS: tuple[PoolName, ...] = ("prefill", "decode", "experts")
_PASSES = {
    ("dispatch", "decode"): 40,
    ("combine", "decode"): 40,
    ("serve", "experts"): 80,
    ("sampled", "decode"): 20,
    ("commit", "frontend"): 80,
}
"""Within which the fault strikes, where steps are frequent; elsewhere it does at one of the first two."""
_LONGEST_STOP_S, _LONGEST_DELAY_S = 1.5, 0.5


def draw_schedule(
    seed: int, duration_s: float = DURATION_S, services: Sequence[Target] = SERVICES, num_faults: int | None = None
) -> Schedule:
    """Faults at random times and at named steps, at most one kill of a member in a second.

    Args:
        services: of those outside the pools, who may be hit.
        num_faults: drawn, from 1 to 3, where it is not given.
    """
    draw = random.Random(seed)
    events: list[Event] = []
    for _ in range(num_faults or draw.randint(1, 3)):
        at_s = round(draw.uniform(0.1, max(0.2, duration_s - 1.0)), 2)
        events += _draw_fault(draw, at_s, services)
    events.sort(key=lambda event: event.at_s)
    return Schedule(name=f"seed {seed}", duration_s=duration_s, events=tuple(events))


def _draw_fault(draw: random.Random, at_s: float, services: Sequence[Target]) -> list[Event]:
    pool: PoolName = draw.choice(_POOLS)
    which = draw.randrange(4)
    match draw.choice(("kill", "kill", "kill service", "stop", "stop", "step", "step", "step", "step", "change")):
        case "kill":
            return [Kill(at_s=at_s, target=pool, which=which)]
        case "kill service" if services:
            return [Kill(at_s=at_s, target=draw.choice(list(services)))]
        case "stop":
            return [Stop(at_s=at_s, target=pool, which=which, for_s=round(draw.uniform(0.1, _LONGEST_STOP_S), 2))]
        case "change":
            return [_draw_change(draw, at_s)]
    steps = [step for step in _STEPS if step[1] in _POOLS or step[1] in services]
    point, target, changing = draw.choice(steps)
    action: Action = draw.choice(
        ("kill", "stop", "delay", "raise") if point == "prepare" else ("kill", "stop", "delay")
    )
    longest_s = _LONGEST_DELAY_S if action == "delay" else _LONGEST_STOP_S
    armed = Arm(
        at_s=at_s,
        target=target,
        which=which,
        point=point,
        action=action,
        after=0 if changing else draw.randrange(_PASSES.get((point, target), 2)),
        for_s=round(draw.uniform(0.05, longest_s), 2),
    )
    if point == "link":
        # It takes somebody new at the other end.
        joined: PoolName = "decode" if target == "experts" else "experts"
        return [armed, Scale(at_s=at_s, pool=joined, by=1)]
    # A change begins when the fault is there.
    return [armed, _draw_change(draw, round(at_s + 0.1, 2))] if changing else [armed]


def _draw_change(draw: random.Random, at_s: float) -> Event:
    if draw.random() < 0.5:
        return Rebalance(at_s=at_s)
    # Shards that leave take all steps of a change, and no process has to start for it.
    return Scale(at_s=at_s, pool="experts", by=-1)
