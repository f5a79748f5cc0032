"""Experts move from shard to shard while streams run."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.fault_points import arm
from cluster.launch import RunningCluster
from octet.client import CallError, Client
from octet.faults import Fault
from tests.clusters import Start, Traffic, members, wait_until

Answers = Mapping[tuple[int, ...], Sequence[int]]


@pytest.fixture(scope="module")
def cluster(start: Start, checkpoint: pathlib.Path) -> RunningCluster:
    # A short window: what few streams happen to ask of the experts differs from one second to the next.
    return start(
        f"model.path={checkpoint}",
        "pools.experts.size=3",
        "pools.experts.redundant_experts=5",
        "telemetry.window_s=1",
        "telemetry.step_s=0.25",
        "chaos.enabled=true",
    )


def test_a_dry_run_only_says_what_would_move(cluster: RunningCluster, answers: Answers) -> None:
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=4) as traffic:
        traffic.flow()
        before = client.status()
        planned = client.rebalance(dry_run=True)
        assert planned.moves
        assert planned.bytes == len(planned.moves) * cluster.plan.census.expert_bytes
        assert planned.balancedness_after > planned.balancedness_before
        assert planned.placement_version == before.placement_version == client.status().placement_version


@pytest.mark.parametrize("seconds", [20, pytest.param(60, marks=pytest.mark.long)])
def test_tokens_stay_the_same_while_experts_move_every_second(
    seconds: int, cluster: RunningCluster, answers: Answers
) -> None:
    num_moved, num_changes = 0, 0
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=16) as traffic:
        traffic.flow()
        version = client.status().placement_version
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            next_s = time.monotonic() + 1
            moved = client.rebalance()
            assert moved.placement_version == version + bool(moved.moves)
            version = moved.placement_version
            num_moved, num_changes = num_moved + len(moved.moves), num_changes + bool(moved.moves)
            time.sleep(max(0.0, next_s - time.monotonic()))
        traffic.flow()
        status = client.status()
        assert all(change.succeeded for change in status.changes)
        # Sixteen experts and five replicas, on two layers: what has moved on is held nowhere else any more.
        assert sum(shard.num_held for shard in members(status, "experts").values()) <= 2 * 21
    assert num_changes >= seconds / 6, f"{num_moved} experts moved in {num_changes} changes: too few to show anything"


@pytest.mark.parametrize("point", ["change.linked", "change.prepared"])
def test_a_rebalance_that_fails_midway_leaves_the_old_placement_serving_and_says_why(
    point: str, cluster: RunningCluster, answers: Answers
) -> None:
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=4) as traffic:
        traffic.flow()
        before = client.status()
        arm(cluster.plan.config.ray.namespace, "controller", Fault(point=point, action="raise"))
        reasons: list[str] = []

        def failed() -> bool:
            """One that has nothing to move does not come to that point."""
            traffic.flow()
            try:
                assert not client.rebalance().moves
            except CallError as error:
                reasons.append(str(error))
            return bool(reasons)

        wait_until(failed, 60, "loads differ enough for experts to move")
        assert point in reasons[0]
        after = client.status()
        assert after.placement_version == before.placement_version
        assert [(change.kind, change.succeeded) for change in after.changes][-1] == ("rebalance", False)
        assert point in after.changes[-1].outcome
        held = [{name: shard.num_held for name, shard in members(s, "experts").items()} for s in (before, after)]
        assert held[0] == held[1], "what was filled in vain is emptied"
        traffic.flow()
        moved = client.rebalance()
        assert moved.placement_version == before.placement_version + bool(moved.moves)


def test_changes_that_are_asked_for_at_once_are_made_one_after_the_other(
    cluster: RunningCluster, answers: Answers
) -> None:
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=4) as traffic:
        traffic.flow()
        before = client.status()
        with ThreadPoolExecutor() as asking:
            rebalances = [asking.submit(client.rebalance) for _ in range(4)]
            scaled = asking.submit(client.scale, experts=4)
            moved = [rebalance.result() for rebalance in rebalances]
            assert {pool.pool: pool.size for pool in scaled.result().sizes}["experts"] == 4
        versions = sorted(answer.placement_version for answer in moved if answer.moves)
        assert len(set(versions)) == len(versions), "no two changes have made the same placement"
        status = client.status()
        assert status.placement_version == before.placement_version + len(versions) + 1
        client.scale(experts=3)
        traffic.flow()


def test_experts_move_by_themselves_where_that_pays_and_rest_afterwards(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    cooldown_s = 3.0
    cluster = start(
        f"model.path={checkpoint}",
        "pools.experts.size=3",
        "telemetry={step_s: 0.25, window_s: 1}",
        f"balancing={{auto: true, check_every_s: 0.2, cooldown_s: {cooldown_s}, min_gain: 0.001, min_tokens: 50}}",
    )
    with Client(cluster.address, timeout_s=60) as client:
        with Traffic(cluster.address, answers, num_users=4) as traffic:
            wait_until(lambda: len(client.status().changes) >= 2, 60, "experts have moved twice")
            traffic.flow()
        changes = client.status().changes
    assert all(change.kind == "rebalance" and change.succeeded for change in changes)
    assert all("balancedness is" in change.reason for change in changes)
    assert changes[1].at_s - changes[0].at_s >= cooldown_s
    cluster.stop(drain=False)
