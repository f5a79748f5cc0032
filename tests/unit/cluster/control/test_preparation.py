from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control.preparation import Preparation
from octet.errors import ChangeRefusedError


class Standby:
    """One process is ready; others start when there is room."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.ready = ["ready-0"]

    async def take(self, pool: str, count: int) -> list[str]:
        taken, self.ready = self.ready[:count], self.ready[count:]
        return taken

    async def start(self, pool: str, count: int) -> list[str]:
        await self.room.wait()
        return [f"new-{number}" for number in range(count)]


async def waiting(ended: list[str]) -> tuple[Preparation, Standby, asyncio.Task[Any]]:
    standby = Standby()
    pools: Any = SimpleNamespace(end=ended.append)
    preparation = Preparation(pools, standby)  # type: ignore[arg-type]
    task = asyncio.create_task(preparation.members("decode", 2))
    await asyncio.sleep(0.01)
    assert preparation.starting == {"decode": 2}
    return preparation, standby, task


async def test_members_come_from_standby_and_from_new_processes() -> None:
    preparation, standby, task = await waiting([])
    preparation.give_up("prefill")
    standby.room.set()
    assert await task == ["ready-0", "new-0"]
    assert preparation.starting == {"decode": 0}


async def test_another_size_ends_the_wait_and_leaves_nothing() -> None:
    ended: list[str] = []
    preparation, _, task = await waiting(ended)
    preparation.give_up("decode")
    with pytest.raises(ChangeRefusedError, match="asked for another size"):
        await task
    assert (ended, preparation.starting) == (["ready-0"], {"decode": 0})


async def test_a_wait_that_is_cancelled_leaves_nothing() -> None:
    ended: list[str] = []
    preparation, _, task = await waiting(ended)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.01)
    assert (ended, preparation.starting) == (["ready-0"], {"decode": 0})
