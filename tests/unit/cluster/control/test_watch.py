"""Who is taken for lost, without Ray: members are objects whose calls can be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.control.pools import Member
from cluster.control.watch import Findings, Watch
from cluster.members import MemberStatus
from octet.config import HealthConfig
from octet.ids import WorkerId

NAME = WorkerId("decode-0")
Status = Callable[[], Awaitable[MemberStatus]]


def status(state: str, reason: str = "", severed: tuple[WorkerId, ...] = ()) -> Status:
    async def answer() -> MemberStatus:
        return MemberStatus(worker_id=NAME, node_id="", pid=1, state=state, reason=reason, severed=severed)

    return answer


async def silence() -> MemberStatus:
    await asyncio.sleep(60)
    raise AssertionError("nobody waits so long")


def member(answer: Status, death: BaseException | None = None) -> Member:
    async def lifeline() -> None:
        if death is not None:
            raise death
        await asyncio.sleep(60)

    actor: Any = SimpleNamespace(
        lifeline=SimpleNamespace(remote=lifeline), status=SimpleNamespace(remote=lambda: answer())
    )
    return Member(worker_id=NAME, pool="decode", actor=actor, berth=SimpleNamespace())  # type: ignore[arg-type]


class Seen:
    def __init__(self, most_without_lane_s: float = 0.1, timeout_s: float = 0.2) -> None:
        self.lost: asyncio.Queue[tuple[WorkerId, str]] = asyncio.Queue()
        self.stranded: asyncio.Queue[tuple[WorkerId, str]] = asyncio.Queue()
        self.severed: asyncio.Queue[tuple[WorkerId, WorkerId]] = asyncio.Queue()
        findings = Findings(
            lost=lambda *found: self.lost.put_nowait(found),
            stranded=lambda *found: self.stranded.put_nowait(found),
            severed=lambda *found: self.severed.put_nowait(found),
        )
        health = HealthConfig(beat_s=0.02, silent_s=0.1, period_s=0.02, timeout_s=timeout_s)
        self.watch = Watch(health, most_without_lane_s, findings)


@pytest.fixture
async def seen() -> AsyncIterator[Seen]:
    seen = Seen()
    yield seen
    seen.watch.close()


@pytest.mark.parametrize(
    ("watched", "why"),
    [
        (lambda: member(status("READY"), ray.exceptions.ActorDiedError()), "its process is gone"),
        (lambda: member(silence), "no answer within 0.2 s"),
        (lambda: member(status("FAILED", "a broken engine")), "a broken engine"),
        (lambda: member(status("WAITING", "PeerLostError")), "it has had no lane for 0.1 s: PeerLostError"),
    ],
    ids=["dead", "silent", "failed", "without a lane"],
)
async def test_a_member_of_no_use_is_lost_once_with_the_reason(
    seen: Seen, watched: Callable[[], Member], why: str
) -> None:
    seen.watch.set([watched()])
    worker, reason = await asyncio.wait_for(seen.lost.get(), 10)
    assert (worker, why in reason) == (NAME, True)
    await asyncio.sleep(0.3)
    assert seen.lost.empty()


async def test_a_member_that_serves_is_not_lost(seen: Seen) -> None:
    seen.watch.set([member(status("READY"))])
    await asyncio.sleep(0.5)
    assert seen.lost.empty()


async def test_an_answer_that_ray_has_lost_is_asked_for_again() -> None:
    asked, seen = 0, Seen(timeout_s=10)

    async def every_third_time() -> MemberStatus:
        nonlocal asked
        asked += 1
        if asked % 3:
            raise ray.exceptions.ActorUnavailableError("an injected failure", None)
        return await status("READY")()

    seen.watch.set([member(every_third_time)])
    await asyncio.sleep(0.6)
    seen.watch.close()
    assert asked > 3
    assert seen.lost.empty()


async def test_a_member_whose_answers_are_all_lost_is_lost() -> None:
    seen = Seen(timeout_s=10)

    async def unavailable() -> MemberStatus:
        raise ray.exceptions.ActorUnavailableError("an injected failure", None)

    seen.watch.set([member(unavailable)])
    worker, reason = await asyncio.wait_for(seen.lost.get(), 10)
    seen.watch.close()
    assert (worker, "ActorUnavailableError" in reason) == (NAME, True)


async def test_a_member_that_is_watched_no_more_may_stop(seen: Seen) -> None:
    seen.watch.set([member(silence)])
    await asyncio.sleep(0.05)
    seen.watch.set([])
    await asyncio.sleep(0.4)
    assert seen.lost.empty()


async def test_a_worker_whose_lane_broke_though_no_shard_is_lost_is_given_another() -> None:
    seen = Seen(most_without_lane_s=60)
    seen.watch.set([member(status("WAITING", "PeerLostError"))])
    assert await asyncio.wait_for(seen.stranded.get(), 10) == (NAME, "PeerLostError")
    assert seen.lost.empty()
    seen.watch.close()


async def test_a_kv_channel_that_stays_broken_is_told_of(seen: Seen) -> None:
    peer = WorkerId("prefill-0")
    seen.watch.set([member(status("READY", severed=(peer,)))])
    assert await asyncio.wait_for(seen.severed.get(), 10) == (NAME, peer)
    assert seen.lost.empty()
