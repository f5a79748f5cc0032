"""Pools grow and shrink while streams run: no request fails, and every token is the one that `transformers` gives."""

from __future__ import annotations

import os
import pathlib
import random
import signal
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from cluster.fault_points import pid_of
from cluster.launch import RunningCluster
from octet.client import CallError, Client
from tests.clusters import Start, Traffic, at_baseline, members, settled, wait_until

Answers = Mapping[tuple[int, ...], Sequence[int]]


def test_the_expert_pool_grows_to_four_shards_and_back(small: RunningCluster, answers: Answers) -> None:
    with Client(small.address, timeout_s=120) as client, Traffic(small.address, answers, num_users=4) as traffic:
        traffic.flow()
        for size in (2, 4, 3, 1):
            before = client.status()
            answer = client.scale(experts=size)
            status = client.status()
            assert {pool.pool: pool.size for pool in answer.sizes}["experts"] == size
            assert (status.epoch, status.placement_version) > (before.epoch, before.placement_version)
            shards = members(status, "experts")
            assert len(shards) == size
            # Sixteen experts on two layers, each exactly once.
            assert sum(shard.num_held for shard in shards.values()) == 32
            traffic.flow()
    assert client_baseline(small)


@pytest.mark.parametrize("pool", ["prefill", "decode"])
def test_an_attention_pool_grows_and_shrinks(small: RunningCluster, answers: Answers, pool: str) -> None:
    with Client(small.address, timeout_s=120) as client, Traffic(small.address, answers, num_users=6) as traffic:
        traffic.flow()
        first = set(members(client.status(), pool))
        client.scale(**{pool: 2})
        (added,) = set(members(client.status(), pool)) - first

        def computes() -> bool:
            ask_at_once(small, 6)
            return members(client.status(), pool)[added].tokens > 0

        wait_until(computes, 60, "the new worker computes tokens")
        assert is_a_fork(small, added)
        client.scale(**{pool: 1})
        assert set(members(client.status(), pool)) == first
        traffic.flow()
    assert client_baseline(small)


def ask_at_once(cluster: RunningCluster, count: int) -> None:
    """What no worker has in its cache: prompts that one has are sent there for as long as it has little to do."""

    def ask(number: int) -> None:
        with Client(cluster.address, timeout_s=60) as client:
            client.generate([random.randrange(3, 512) for _ in range(48)], max_new_tokens=2, ignore_eos=True)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(ask, range(count)))


def test_a_decode_worker_that_leaves_hands_its_running_sequences_over(small: RunningCluster) -> None:
    prompts = [[random.randrange(3, 512) for _ in range(random.randint(5, 40))] for _ in range(6)]
    options: dict[str, Any] = {"max_new_tokens": 400, "ignore_eos": True}
    with Client(small.address, timeout_s=120) as client:
        client.scale(decode=2)
        expected = [list(client.generate(prompt, **options).choices[0].token_ids) for prompt in prompts]
        before = computed_tokens(client)
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = [pool.submit(client.generate, prompt, **options) for prompt in prompts]
            wait_until(lambda: min(running(client)) > 0 and sum(running(client)) == 6, 60, "both workers decode")
            client.scale(decode=1)
            assert running(client) == [6], "all of them go on at the worker that stays"
            assert [list(answer.result(120).choices[0].token_ids) for answer in answers] == expected
        # Every prompt was computed once: nothing that was generated had to be computed again.
        assert computed_tokens(client) - before == sum(map(len, prompts))
        wait_until(lambda: at_baseline(client.status()), 30, "pages back to baseline")


def is_a_fork(cluster: RunningCluster, worker_id: str) -> bool:
    """Of a process that has imported what members need."""
    pid = pid_of(cluster.plan.config.ray.namespace, worker_id)
    parent = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
    return b"cluster.workers.fork_server" in pathlib.Path(f"/proc/{parent}/cmdline").read_bytes()


def running(client: Client) -> list[int]:
    """Sequences of each decode worker."""
    return [member.running for member in members(client.status(), "decode").values()]


def computed_tokens(client: Client) -> int:
    """By the prefill workers, or found in their caches."""
    return sum(m.tokens + m.cached_tokens for m in members(client.status(), "prefill").values())


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"experts": 17}, "at most the model's 16 experts"),
        ({"experts": 0}, "at least 1"),
        ({"decode": 0}, "at least 1"),
    ],
)
def test_a_size_that_cannot_be_is_refused_with_the_reason(
    small: RunningCluster, sizes: dict[str, int], reason: str
) -> None:
    with Client(small.address, timeout_s=60) as client:
        before = client.status()
        with pytest.raises(CallError, match=reason) as refused:
            client.scale(**sizes)
        assert refused.value.code == grpc.StatusCode.FAILED_PRECONDITION
        assert client.status().epoch == before.epoch


def test_a_pool_of_another_name_is_a_bad_request(small: RunningCluster) -> None:
    with Client(small.address, timeout_s=60) as client, pytest.raises(CallError, match=r"sizes\[0\]\.pool") as refused:
        client.scale(routers=2)
    assert refused.value.code == grpc.StatusCode.INVALID_ARGUMENT


def client_baseline(small: RunningCluster) -> bool:
    with Client(small.address, timeout_s=60) as client:
        wait_until(lambda: at_baseline(client.status()), 30, "pages back to baseline")
    return True


def test_a_process_on_standby_takes_the_place_of_a_lost_one_at_once(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    cluster = start(f"model.path={checkpoint}", "pools.experts.size=2", "pools.experts.standby=1")
    with Client(cluster.address, timeout_s=120) as client:
        wait_until(lambda: bool(members(client.status(), "experts", standby=True)), 60, "a process is ready")
        (ready,) = members(client.status(), "experts", standby=True)
        with Traffic(cluster.address, answers, num_users=3) as traffic:
            traffic.flow()
            os.kill(members(client.status(), "experts")["experts-0"].pid, signal.SIGKILL)
            wait_until(lambda: ready in members(client.status(), "experts"), 60, "it has joined")
            wait_until(lambda: settled(client, experts=2), 60, "two shards again")
            traffic.flow()
            # Another one is made ready in place of the one that joined, and joins when the pool grows.
            wait_until(lambda: bool(members(client.status(), "experts", standby=True)), 60, "the next is ready")
            (ready,) = members(client.status(), "experts", standby=True)
            client.scale(experts=3)
            assert ready in members(client.status(), "experts")
        assert client.status().requests_failed == 0
    cluster.stop(drain=False)
