"""One cluster for every test here, to which any harm may be done: each test waits until it is as it was."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import pytest

from cluster.launch import RunningCluster
from octet.client import AsyncClient
from octet.v1 import octet_pb2 as pb
from ops.chaos.command import questioned
from ops.chaos.history import Facts, Question
from ops.chaos.own import own_cluster
from ops.chaos.questions import Asked
from ops.chaos.run import Load, Verdict, run_schedule
from ops.chaos.schedule import Event, Schedule
from ops.chaos.stage import Stage
from tests.reference import Reference


@dataclasses.dataclass(frozen=True)
class Chaos:
    cluster: RunningCluster
    questions: Sequence[Question]
    start: Facts
    """Of the cluster before anything was done to it."""

    def run(self, *events: Event, duration_s: float = 1.0, complete: bool = False) -> Verdict:
        """Under load. Returns: what came of it.

        Args:
            complete: wait until everybody who was lost is replaced.
        """
        (verdict,) = self.run_all([Schedule(duration_s=duration_s, events=events)], complete)
        return verdict

    def run_all(self, schedules: Sequence[Schedule], complete: bool = True) -> list[Verdict]:
        """One after the other; the last one waits for everybody who was lost, if that is asked for."""

        async def play() -> list[Verdict]:
            async with AsyncClient(self.cluster.address, timeout_s=120) as client:
                stage = Stage(self.cluster.plan, self.cluster.address, client)
                verdicts = []
                for number, schedule in enumerate(schedules):
                    whole = complete and number == len(schedules) - 1
                    load = Load(users=3, tail_s=0.2, seed=number)
                    verdicts.append(
                        await run_schedule(stage, schedule, self.questions, load, complete=whole, start=self.start)
                    )
                return verdicts

        return asyncio.run(play())

    def whole(self) -> bool:
        """Whether every pool has as many members as at the start, and nothing is under way."""
        status = self.status()
        idle = status.state == "READY" and not status.change_under_way
        sizes = {pool.name: sum(member.state != "STANDBY" for member in pool.members) for pool in status.pools}
        return idle and sizes == dict(self.start.sizes)

    def status(self) -> pb.GetStatusResponse:
        async def ask() -> pb.GetStatusResponse:
            async with AsyncClient(self.cluster.address, timeout_s=60) as client:
                return await client.status()

        return asyncio.run(ask())


@pytest.fixture(scope="package")
def chaos(ray_session: None, checkpoint: pathlib.Path, reference: Reference) -> Iterator[Chaos]:
    with own_cluster(checkpoint) as cluster:

        async def prepare() -> tuple[Facts, list[Question]]:
            async with questioned(cluster, Asked(new_tokens=32)) as (stage, questions):
                return await stage.facts(), questions

        start, questions = asyncio.run(prepare())
        for question in questions:
            if question.seed is None:
                reference.check(question.prompt, question.expected[0])
        yield Chaos(cluster, questions, start)
