"""Actors without processes, which answer when a test says so, and members that are such actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.control.membership import Membership
from cluster.control.pools import Member
from cluster.members import Endpoint, MemberStatus, Pool
from octet.errors import UnavailableError
from octet.ids import WorkerId
from octet.messages import WorkerLoad
from tests.unit.cluster.played import PLAN


class Played:
    """An actor that answers every call at once, but for those that it never answers."""

    def __init__(self, worker_id: str, *, hangs_at: tuple[str, ...] = (), refuses: tuple[str, ...] = ()) -> None:
        self.worker_id, self.hangs_at, self.refuses = WorkerId(worker_id), hangs_at, refuses
        self.calls: list[str] = []
        self.asked: list[tuple[str, tuple[Any, ...]]] = []
        self.mailboxes: dict[WorkerId, str] = {}
        self.asked_in_vain, self.may_go_on = asyncio.Event(), asyncio.Event()

    def __getattr__(self, method: str) -> Any:
        return _Method(lambda *args: self._answer(method, *args))

    async def _answer(self, method: str, *args: Any) -> Endpoint | MemberStatus | None:
        self.calls.append(method)
        self.asked.append((method, args))
        if method == "meet":
            self.mailboxes |= args[0]
        if method in self.hangs_at:
            self.asked_in_vain.set()
            await self.may_go_on.wait()
        if method in self.refuses:
            raise UnavailableError(f"{method}: not now")
        if method == "status":
            load = WorkerLoad(kv_pages_total=1, kv_pages_free=1, running=0, waiting=0, tokens=0)
            return MemberStatus(worker_id=self.worker_id, node_id="n", pid=1, state="READY", load=load)
        if method != "endpoint":
            return None
        return Endpoint(worker_id=self.worker_id, mailbox="tcp://h:1", store="h:2", node_id="n", pid=1)


class _Method:
    def __init__(self, answer: Callable[..., Awaitable[Any]]) -> None:
        self._answer = answer

    def remote(self, *args: object) -> Awaitable[Any]:
        return self._answer(*args)


def member(pool: Pool, actor: Played) -> Member:
    berth: Any = None
    return Member(worker_id=actor.worker_id, pool=pool, actor=actor, berth=berth)


async def serving(*members: Member) -> Membership:
    membership = Membership(PLAN, {})
    await membership.reach(members)
    await membership.found(members)
    return membership
