"""The autoscaler end to end: a burst makes pools grow, and quiet makes them shrink again."""

from __future__ import annotations

import pathlib
import random
import time
from collections.abc import Mapping, Sequence

import pytest

from cluster.members import POOLS
from octet.client import Client
from octet.resumption import CallError
from octet.v1 import octet_pb2 as pb
from tests.clusters import Start, Traffic, members, wait_until

Answers = Mapping[tuple[int, ...], Sequence[int]]


def test_a_burst_makes_the_decode_pool_grow_and_quiet_makes_it_shrink(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    bounds = "min_replicas: 1, max_replicas: 1"
    cluster = start(
        f"model.path={checkpoint}",
        "pools.experts.size=1",
        # A worker's batch is full with four sequences, so that a test's load is a burst.
        "decode.max_batch=4",
        "telemetry={step_s: 0.5, window_s: 10, half_life_s: 10}",
        f"autoscaler.prefill={{{bounds}}}",
        f"autoscaler.experts={{{bounds}}}",
        "autoscaler.decode={min_replicas: 1, max_replicas: 2, upscale_delay_s: 1, downscale_delay_s: 3}",
        "autoscaler.enabled=true",
        "autoscaler.metrics_interval_s=1",
        "autoscaler.look_back_period_s=4",
        "autoscaler.cold_start_s=0",
        "autoscaler.reversal_cooldown_s=0",
        "autoscaler.forecast_horizon_s=0",
    )
    with Client(cluster.address, timeout_s=120) as client:
        with Traffic(cluster.address, answers, num_users=12) as traffic:
            wait_until(lambda: len(members(client.status(), "decode")) == 2, 90, "the decode pool grows")
            traffic.flow()
        try:
            wait_until(lambda: len(members(client.status(), "decode")) == 1, 90, "the decode pool shrinks")
        finally:
            # Shown where the test fails.
            print(client.status().decisions, client.status().latest_decisions)
        status = client.status()
        sizes = [(d.pool, d.current, d.target, d.outcome) for d in status.decisions]
        assert sizes[0] == ("decode", 1, 2, "done")
        assert ("decode", 2, 1, "done") in sizes
        assert all(decision.reason for decision in status.decisions)
        assert status.requests_failed == 0
    cluster.stop(drain=False)


def test_all_pools_go_to_zero_when_nothing_is_asked_for_and_the_next_request_brings_them_back(
    start: Start, checkpoint: pathlib.Path, answers: Answers
) -> None:
    bounds = "min_replicas: 0, max_replicas: 2, downscale_delay_s: 1, upscale_delay_s: 1"
    cluster = start(
        f"model.path={checkpoint}",
        "pools.experts.size=2",
        *(f"autoscaler.{pool}={{{bounds}}}" for pool in POOLS),
        "autoscaler.enabled=true",
        "autoscaler.metrics_interval_s=1",
        "autoscaler.look_back_period_s=2",
        "autoscaler.cold_start_s=0",
        "autoscaler.reversal_cooldown_s=0",
        "autoscaler.forecast_horizon_s=0",
    )

    def sizes(status: pb.GetStatusResponse) -> list[int]:
        return [len(members(status, pool)) for pool in POOLS]

    with Client(cluster.address, timeout_s=120) as client:
        try:
            for _ in range(2):
                wait_until(lambda: sizes(client.status()) == [0, 0, 0], 60, "everybody leaves")
                assert "no member is there" in client.status().reason
                with pytest.raises(CallError, match="no expert shard serves"):
                    client.rebalance(dry_run=True)
                for prompt, answer in answers.items():
                    got = client.generate(list(prompt), max_new_tokens=len(answer), ignore_eos=True, temperature=0.0)
                    assert list(got.choices[0].token_ids) == list(answer)
                    # The next one may come while they leave again.
                    time.sleep(random.uniform(0, 4))
        finally:
            # Shown where the test fails.
            print(client.status())
        status = client.status()
        done = {(d.pool, d.target) for d in status.decisions if d.outcome == "done"}
        assert done >= {(pool, size) for pool in POOLS for size in (0, 1)}
        assert status.requests_failed == 0
    cluster.stop(drain=False)
