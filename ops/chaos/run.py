"""One schedule on one cluster, from facts before to facts after; and many, one after the other."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence

from octet.client import CallError
from ops.chaos.checker import check
from ops.chaos.clients import Users
from ops.chaos.history import Facts, History, Question, Sample
from ops.chaos.inject import play
from ops.chaos.schedule import Schedule
from ops.chaos.stage import Stage
from ops.chaos.violations import Violation

_SAMPLE_S = 0.25


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What users ask while faults happen."""

    users: int = 4
    timeout_s: float = 90.0
    """Deadline of each request."""
    tail_s: float = 0.5
    """How long they go on after the last fault is over."""
    seed: int = 0
    """Of who asks what, and who leaves when; of the first of several schedules, and one more for each after it."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    schedule: Schedule
    history: History
    violations: tuple[Violation, ...]


async def run_schedule(
    stage: Stage,
    schedule: Schedule,
    questions: Sequence[Question],
    load: Load,
    complete: bool = True,
    start: Facts | None = None,
) -> Verdict:
    """
    Args:
        complete: wait until lost members are replaced and sizes are as before; otherwise only until nothing is held.
        start: what everything has to be like again then, where that is not as it is now: losses of the schedule before
            may not be replaced yet.

    Raises: UnavailableError if the cluster does not say how it is for two minutes.
    """
    before = await stage.facts()
    if start is not None:
        before = dataclasses.replace(start, at_s=before.at_s, epoch=before.epoch)
    if stage.trail is not None:
        # What was done before is not this schedule's.
        stage.trail.read()
    begin_s = time.time()
    samples: list[Sample] = []
    sampler = asyncio.create_task(_sample(stage, samples))
    try:
        async with Users(stage.address, questions, load.users, load.timeout_s, load.seed) as users:
            faults = await play(stage, schedule, begin_s)
            await asyncio.sleep(max(load.tail_s, begin_s + schedule.duration_s - time.time()))
    finally:
        sampler.cancel()
    end_s = time.time()
    if any(event.do == "scale" for event in schedule.events):
        stage.restore_sizes()
    host_lost = any(event.do == "kill_node" or (event.do == "cut" and event.for_s is None) for event in schedule.events)
    after = await stage.settle(before, complete, host_lost)
    history = History(
        name=schedule.name,
        begin_s=begin_s,
        end_s=end_s,
        streams=users.streams,
        commits=stage.trail.read() if stage.trail is not None else None,
        faults=faults,
        samples=samples,
        before=before,
        after=after,
        complete=complete,
        host_lost=host_lost,
    )
    return Verdict(schedule=schedule, history=history, violations=tuple(check(history)))


async def _sample(stage: Stage, samples: list[Sample]) -> None:
    while True:
        try:
            status = await stage.client.status(timeout_s=5.0)
        except CallError:
            # While a service is gone, nothing is known.
            await asyncio.sleep(_SAMPLE_S)
            continue
        sizes = {pool.name: len(pool.members) for pool in status.pools}
        samples.append(Sample(at_s=time.time(), epoch=status.epoch, state=status.state, sizes=sizes))
        await asyncio.sleep(_SAMPLE_S)
