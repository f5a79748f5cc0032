"""Experts move from shard to shard while streams run."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Mapping, Sequence

import pytest

from cluster.launch import RunningCluster
from octet.client import Client
from tests.clusters import Start, Traffic, members

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
