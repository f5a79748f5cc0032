"""Who is slow: the policy, played second by second."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cluster.control.slow_members import SlowMembers
from cluster.control.slowness import Signs, Slowness, Verdict
from octet.config import HealthConfig
from octet.ids import WorkerId

A, B, C = (WorkerId(f"experts-{number}") for number in range(3))
HEALTH = HealthConfig(slow_ratio=3.0, slow_s=2.0, evict_slow_s=30.0)
WELL = Signs(late=0.02, service_s=0.001)


def after(slowness: Slowness, begin_s: int, end_s: int, signs: dict[WorkerId, Signs]) -> Verdict:
    verdict = Verdict(slow={}, evicted={})
    for second in range(begin_s, end_s + 1):
        verdict = slowness.judge(float(second), signs)
    return verdict


@pytest.mark.parametrize(
    ("signs", "why"),
    [
        (Signs(late=0.6, service_s=0.001), "it has missed 60% of its beats, and the others 2%"),
        (Signs(late=0.02, service_s=0.010), "an expert takes it 10.0 ms, and the others 1.0 ms"),
    ],
    ids=["not scheduled", "computes slowly"],
)
def test_a_member_that_is_slower_than_its_peers_is_named_and_evicted_in_the_end(signs: Signs, why: str) -> None:
    slowness = Slowness(HEALTH)
    pool = {A: WELL, B: WELL, C: signs}
    assert after(slowness, 0, 1, pool).slow == {}
    assert after(slowness, 2, 2, pool) == Verdict(slow={C: why}, evicted={})
    assert after(slowness, 3, 29, pool).evicted == {}
    assert after(slowness, 30, 30, pool).evicted == {C: f"it has been slow for 30 s: {why}"}


def test_one_that_recovers_is_slow_no_more_and_begins_anew() -> None:
    slowness = Slowness(HEALTH)
    slow = {A: WELL, B: WELL, C: Signs(late=0.6)}
    assert after(slowness, 0, 25, slow).slow.keys() == {C}
    assert after(slowness, 26, 27, {A: WELL, B: WELL, C: WELL}).slow.keys() == {C}
    assert after(slowness, 28, 28, {A: WELL, B: WELL, C: WELL}).slow == {}
    assert after(slowness, 29, 40, slow).evicted == {}


def test_a_single_pause_is_not_slowness() -> None:
    slowness = Slowness(HEALTH)
    well = {A: WELL, B: WELL, C: WELL}
    assert after(slowness, 0, 1, {**well, C: Signs(late=0.6)}).slow == {}
    assert after(slowness, 2, 3, well).slow == {}


def test_where_everybody_is_slow_nobody_is() -> None:
    busy = Signs(late=0.5, service_s=0.1)
    assert after(Slowness(HEALTH), 0, 60, {A: busy, B: busy, C: busy}) == Verdict(slow={}, evicted={})


def test_one_alone_is_never_slow() -> None:
    assert after(Slowness(HEALTH), 0, 60, {A: Signs(late=0.9)}) == Verdict(slow={}, evicted={})


def test_times_too_short_to_tell_are_not_compared() -> None:
    fast, slower = Signs(late=0.0, service_s=1e-5), Signs(late=0.0, service_s=1e-4)
    assert after(Slowness(HEALTH), 0, 60, {A: fast, B: fast, C: slower}).slow == {}


def test_one_is_evicted_at_a_time_and_none_where_it_is_switched_off() -> None:
    signs = {A: Signs(late=0.9), B: Signs(late=0.9), C: WELL, WorkerId("d"): WELL, WorkerId("e"): WELL}
    assert len(after(Slowness(HEALTH), 0, 60, signs).evicted) == 1
    kept = Slowness(HEALTH.model_copy(update={"evict_slow_s": None}))
    assert after(kept, 0, 60, signs).evicted == {}


class Members:
    """Three shards, one of which gives no pulse, and what is done about it."""

    def __init__(self, evict_slow_s: float | None) -> None:
        self.shunned: list[frozenset[WorkerId]] = []
        self.lost: list[WorkerId] = []
        self.late = {A: 0.0, B: 0.9, C: 0.0}
        self.routing = SimpleNamespace(shards=(A, B, C), shunned=frozenset())
        mine: Any = self
        config = HealthConfig(slow_ratio=3.0, slow_s=1e-6, evict_slow_s=evict_slow_s)
        self.slow = SlowMembers(config, mine, mine, lambda: self.late, self._telemetry, self._lose)

    def pool(self, pool: str) -> list[Any]:
        return [SimpleNamespace(worker_id=each) for each in (A, B, C)] if pool == "experts" else []

    async def shun(self, shards: frozenset[WorkerId], reason: str) -> None:
        self.shunned.append(shards)
        self.routing.shunned = shards

    async def _telemetry(self) -> None:
        return None

    def _lose(self, worker_id: WorkerId, reason: str) -> None:
        self.lost.append(worker_id)


async def test_a_slow_shard_is_asked_for_less_once_and_as_before_when_it_is_well() -> None:
    members = Members(evict_slow_s=None)
    for _ in range(4):
        await members.slow._look()
    assert members.shunned == [frozenset({B})]
    assert (list(members.slow.slow), members.lost) == ([B], [])
    members.late[B] = 0.0
    for _ in range(4):
        await members.slow._look()
    assert (members.shunned, members.slow.slow) == ([{B}, frozenset()], {})


async def test_a_shard_that_is_parted_with_is_not_asked_for_less_as_well() -> None:
    """That would be one more change of the routing, before the one that goes on without it."""
    members = Members(evict_slow_s=1e-6)
    await members.slow._look()
    # It has been asked for less for a while by now.
    members.routing.shunned = frozenset({B})
    await members.slow._look()
    assert (members.lost, members.shunned) == ([B], [])
