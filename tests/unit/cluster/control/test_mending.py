"""What is broken between members that live, by changes that are played."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from cluster.control.mending import Mending
from octet.errors import UnavailableError
from octet.ids import WorkerId
from tests.unit.cluster.played import soon
from tests.unit.cluster.played_actors import Played, member, serving

PREFILL, DECODE = WorkerId("prefill-0"), WorkerId("decode-0")


class Changes:
    """Mends when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.may_end, self.fails = asyncio.Event(), False

    async def relink(self, worker_id: WorkerId, reason: str) -> None:
        await self._mend("relink", worker_id, reason)

    async def reopen(self, source: WorkerId, target: WorkerId) -> None:
        await self._mend("reopen", source, target)

    async def _mend(self, *asked: str) -> None:
        self.asked.append(asked)
        await self.may_end.wait()
        if self.fails:
            raise UnavailableError("a member was lost meanwhile")


class Broken:
    """A lane or a channel, of which somebody says over and over that it is."""

    def __init__(self, membership: Any) -> None:
        self.changes, self.lost = Changes(), ""
        self.tasks: list[asyncio.Task[None]] = []
        any_changes: Any = self.changes
        self.mending = Mending(membership, lambda: any_changes, lambda: self.lost, self._spawn)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work))

    async def over(self) -> None:
        self.changes.may_end.set()
        await soon(asyncio.gather(*self.tasks))  # type: ignore[arg-type]
        self.changes.may_end.clear()


async def broken() -> Broken:
    actors = {name: Played(name) for name in (PREFILL, DECODE, "experts-0")}
    return Broken(await serving(*(member(name.partition("-")[0], actor) for name, actor in actors.items())))  # type: ignore[arg-type]


async def test_a_lane_is_formed_anew_once_at_a_time_and_again_where_that_has_failed() -> None:
    found = await broken()
    for fails in (True, False, False):
        found.changes.fails, found.changes.asked = fails, []
        for _ in range(3):
            found.mending.stranded(DECODE, "it has none")
        found.mending.stranded(PREFILL, "nor has it")
        await found.over()
        assert found.changes.asked == [("relink", DECODE, "it has none"), ("relink", PREFILL, "nor has it")]


async def test_a_channel_is_opened_once_whichever_end_has_noticed() -> None:
    found = await broken()
    found.mending.severed(DECODE, PREFILL)
    found.mending.severed(PREFILL, DECODE)
    found.mending.severed(PREFILL, WorkerId("decode-9"))
    await found.over()
    assert found.changes.asked == [("reopen", PREFILL, DECODE)]


async def test_while_somebody_is_lost_nothing_is_mended() -> None:
    """Its loss comes first, and forms other lanes anyway."""
    found = await broken()
    found.lost = "experts-0: killed"
    found.mending.stranded(DECODE, "it has none")
    assert found.tasks == []
    found.lost = ""
    found.mending.stranded(DECODE, "it has none")
    await found.over()
    assert len(found.changes.asked) == 1
