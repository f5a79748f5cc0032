"""Members are killed while streams run: every stream goes on to the tokens that `transformers` gives."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
from collections.abc import Mapping, Sequence

import pytest
import ray

from cluster.launch import RunningCluster
from octet.client import Client
from tests.clusters import Start, Traffic, at_baseline, members, settled, wait_until

Answers = Mapping[tuple[int, ...], Sequence[int]]


@pytest.fixture(scope="module")
def cluster(start: Start, checkpoint: pathlib.Path) -> RunningCluster:
    return start(f"model.path={checkpoint}", "pools.prefill.size=2", "pools.decode.size=2", "pools.experts.size=3")


def kill(client: Client, pool: str) -> str:
    """The first member of a pool. Returns: its id."""
    worker_id, member = next(iter(members(client.status(), pool).items()))
    os.kill(member.pid, signal.SIGKILL)
    return worker_id


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has collected."""
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("pool", "size"), [("experts", 3), ("decode", 2), ("prefill", 2)])
def test_a_killed_member_costs_no_token_and_is_replaced(
    cluster: RunningCluster, answers: Answers, pool: str, size: int
) -> None:
    with Client(cluster.address, timeout_s=60) as client:
        with Traffic(cluster.address, answers, num_users=4) as traffic:
            traffic.flow()
            lost = kill(client, pool)
            wait_until(
                lambda: lost not in members(client.status(), pool) and settled(client, **{pool: size}),
                90,
                f"another member in place of {lost}",
            )
            traffic.flow()
        status = client.status()
        assert [change.kind for change in status.changes if lost in change.reason] == ["recovery", "scale"]
        assert all(change.succeeded for change in status.changes)
        wait_until(lambda: at_baseline(client.status()), 30, "pages back to baseline")


def test_the_only_decode_worker_may_be_killed(start: Start, checkpoint: pathlib.Path, answers: Answers) -> None:
    cluster = start(f"model.path={checkpoint}", "pools.experts.size=1")
    with Client(cluster.address, timeout_s=60) as client:
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            lost = kill(client, "decode")
            wait_until(lambda: lost not in members(client.status(), "decode"), 30, "the loss is seen")
            traffic.flow(timeout_s=90)
        assert client.status().requests_failed == 0
    cluster.stop(drain=False)


def test_every_shard_may_be_killed_at_once(start: Start, checkpoint: pathlib.Path, answers: Answers) -> None:
    cluster = start(f"model.path={checkpoint}", "pools.experts.size=2")
    with Client(cluster.address, timeout_s=60) as client:
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            for member in members(client.status(), "experts").values():
                os.kill(member.pid, signal.SIGKILL)
            wait_until(lambda: client.status().epoch > 1, 60, "another epoch")
            wait_until(lambda: settled(client, experts=2), 90, "two shards again")
            traffic.flow()
        assert client.status().requests_failed == 0
    cluster.stop(drain=False)


@pytest.mark.parametrize("pool", ["experts", "decode"])
def test_a_member_that_hangs_is_replaced_and_does_not_come_back(
    start: Start, checkpoint: pathlib.Path, answers: Answers, pool: str
) -> None:
    cluster = start(f"model.path={checkpoint}", "health.timeout_s=4", "pools.decode.size=2")
    with Client(cluster.address, timeout_s=60) as client:
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            hung, member = next(iter(members(client.status(), pool).items()))
            os.kill(member.pid, signal.SIGSTOP)
            wait_until(
                lambda: hung not in members(client.status(), pool) and settled(client, **{pool: 2}), 90, "another one"
            )
            traffic.flow()
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGCONT)
            wait_until(lambda: not alive(member.pid), 30, "it is dead")
        status = client.status()
        assert status.requests_failed == 0
        assert any("no sign of life" in change.reason for change in status.changes)
    cluster.stop(drain=False)


def test_the_data_path_goes_on_without_the_router_service(cluster: RunningCluster, answers: Answers) -> None:
    namespace = cluster.plan.config.ray.namespace
    with Client(cluster.address, timeout_s=60) as client, Traffic(cluster.address, answers, num_users=3) as traffic:
        traffic.flow()
        ray.kill(ray.get_actor("router", namespace=namespace))
        wait_until(lambda: client.status().window_s > 0, 60, "another router service tells of the load")
        traffic.flow()
        assert client.status().state == "READY"


def test_a_lost_shard_whose_experts_have_replicas_takes_nothing_from_the_checkpoint(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    cluster = start(
        f"model.path={checkpoint}",
        "pools.experts.size=2",
        "pools.experts.redundant_experts=16",
    )
    with Client(cluster.address, timeout_s=60) as client:
        held = {worker_id: member.num_held for worker_id, member in members(client.status(), "experts").items()}
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            lost = kill(client, "experts")
            wait_until(lambda: lost not in members(client.status(), "experts"), 60, "the loss is dealt with")
            (survivor,) = [w for w in held if w != lost]
            assert members(client.status(), "experts")[survivor].num_held == held[survivor]
            traffic.flow()
    cluster.stop(drain=False)
