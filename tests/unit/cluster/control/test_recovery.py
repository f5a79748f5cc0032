from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest

from cluster.control.recovery import Recovery
from cluster.members import Pool
from octet.errors import UnavailableError
from octet.ids import WorkerId


class Cluster:
    """Two members of each pool; what is missing comes only where there is room."""

    def __init__(self, no_room: set[Pool]) -> None:
        self.sizes: dict[Pool, int] = {"prefill": 2, "decode": 2, "experts": 2}
        self.wanted = dict(self.sizes)
        self.no_room, self.refusals = no_room, 0
        self.bugs: list[str] = []
        """Steps that fail once, with an error of no kind."""
        self.room = asyncio.Event()
        self.recovery = Recovery(self, self.short, retry_s=0.0)

    def short(self) -> dict[Pool, int]:
        return {pool: size for pool, size in self.wanted.items() if self.sizes[pool] < size}

    def lose(self, pool: Pool, name: str) -> None:
        self.recovery.add(WorkerId(name), "killed")

    async def recover(self, lost: Mapping[WorkerId, str]) -> None:
        self._step("recover")
        if self.refusals:
            self.refusals -= 1
            raise UnavailableError("not yet")
        for name in lost:
            self.sizes[name.partition("-")[0]] -= 1  # type: ignore[index]

    async def replenish(self, pool: Pool, size: int, reason: str) -> None:
        assert reason.startswith("to replace ")
        self._step("replenish")
        if pool in self.no_room:
            await self.room.wait()
        self.sizes[pool] = size

    def _step(self, name: str) -> None:
        if name in self.bugs:
            self.bugs.remove(name)
            raise RuntimeError(name)


async def until(cluster: Cluster, sizes: dict[Pool, int]) -> None:
    for _ in range(1000):
        if cluster.sizes == sizes:
            return
        await asyncio.sleep(0)
    assert cluster.sizes == sizes


async def test_a_pool_without_room_holds_up_neither_other_pools_nor_the_next_loss() -> None:
    cluster = Cluster(no_room={"decode"})
    cluster.lose("decode", "decode-0")
    cluster.lose("experts", "experts-0")
    running = asyncio.create_task(cluster.recovery.run())
    await until(cluster, {"prefill": 2, "decode": 1, "experts": 2})
    cluster.lose("prefill", "prefill-1")
    assert cluster.recovery.reason == "prefill-1: killed"
    await asyncio.sleep(0)
    await until(cluster, {"prefill": 2, "decode": 1, "experts": 2})
    assert not running.done()
    cluster.room.set()
    await asyncio.wait_for(running, 10)
    assert cluster.sizes == cluster.wanted


async def test_what_fails_again_and_again_is_tried_less_often_until_another_one_is_lost() -> None:
    cluster = Cluster(no_room=set())
    cluster.recovery = Recovery(cluster, cluster.short, retry_s=1.0)
    pauses = [cluster.recovery.pause_s]
    for cluster.recovery._failures in range(1, 10):
        pauses.append(cluster.recovery.pause_s)
    assert pauses == [1, 1, 1, 1, 2, 4, 8, 15, 15, 15]
    cluster.refusals = 1
    cluster.lose("decode", "decode-0")
    running = asyncio.create_task(cluster.recovery.run())
    for _ in range(100):
        await asyncio.sleep(0)
    assert (cluster.refusals, running.done()) == (0, False)
    cluster.lose("experts", "experts-0")
    # At once, not after fifteen seconds.
    await asyncio.wait_for(running, 5)
    assert cluster.sizes == cluster.wanted
    assert cluster.recovery.pause_s == 1


async def waited_until_less_was_wanted() -> Cluster:
    """It had no room for a decode worker, and then was to have one less."""
    cluster = Cluster(no_room={"decode"})
    cluster.lose("decode", "decode-0")
    running = asyncio.create_task(cluster.recovery.run())
    await until(cluster, {"prefill": 2, "decode": 1, "experts": 2})
    cluster.wanted["decode"] = 1
    cluster.lose("experts", "experts-1")
    await asyncio.wait_for(running, 10)
    return cluster


async def test_a_pool_that_shall_be_smaller_is_waited_for_no_more() -> None:
    cluster = await waited_until_less_was_wanted()
    assert cluster.sizes == cluster.wanted


async def test_what_fails_is_tried_again() -> None:
    cluster = Cluster(no_room=set())
    cluster.refusals = 3
    cluster.lose("experts", "experts-1")
    await asyncio.wait_for(cluster.recovery.run(), 10)
    assert cluster.sizes == cluster.wanted


async def test_the_next_loss_is_made_up_for_though_the_last_one_was_given_up_half_way() -> None:
    cluster = await waited_until_less_was_wanted()
    await asyncio.sleep(0)
    cluster.lose("prefill", "prefill-1")
    await asyncio.wait_for(cluster.recovery.run(), 10)
    assert cluster.sizes == cluster.wanted


async def test_recovery_goes_on_whatever_a_step_fails_with(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(no_room=set())
    cluster.bugs = ["recover", "replenish"]
    cluster.lose("decode", "decode-0")
    await asyncio.wait_for(cluster.recovery.run(), 10)
    assert cluster.sizes == cluster.wanted
    assert cluster.bugs == []
    for step in ("recover", "replenish"):
        assert f"RuntimeError: {step}" in caplog.text, "it is not hidden"
