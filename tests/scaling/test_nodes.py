"""Ray nodes join and leave, and one is lost: real raylets on this machine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.launch import RunningCluster
from octet.client import CallError, Client
from tests.clusters import (
    DECODE_PLACES,
    OBJECT_STORE_BYTES,
    Start,
    Traffic,
    at_baseline,
    members,
    settled,
    wait_until,
)

Answers = Mapping[tuple[int, ...], Sequence[int]]

_LOSS_S = 60.0
"""Generous, for a slow machine: what the loss of a node costs is printed, not judged."""


@pytest.fixture(scope="module")
def cluster(start: Start, checkpoint: pathlib.Path) -> RunningCluster:
    """One decode worker, and no room for another."""
    return start(f"model.path={checkpoint}", "pools.experts.size=1", f"pools.decode.resources={{{DECODE_PLACES}: 1}}")


def add_node(nodes: Cluster) -> Any:
    return nodes.add_node(num_cpus=2, resources={DECODE_PLACES: 1}, object_store_memory=OBJECT_STORE_BYTES)


def groups(state: str) -> int:
    return sum(group["state"] == state for group in placement_group_table().values())


def free() -> float:
    """Places for decode workers."""
    return float(ray.available_resources().get(DECODE_PLACES, 0.0))


@contextlib.contextmanager
def scaling(client: Client, **sizes: int) -> Iterator[list[BaseException]]:
    """Ask for sizes meanwhile, and wait for the answer at the end. Yields: what it was refused with, then."""
    refusals: list[BaseException] = []

    def ask() -> None:
        try:
            client.scale(**sizes)
        except CallError as error:
            refusals.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    yield refusals
    asking.join(90)
    assert not asking.is_alive(), "the scale-up has no end"


def test_a_pool_grows_onto_a_node_that_joins_and_gives_it_back(
    nodes: Cluster, cluster: RunningCluster, answers: Answers
) -> None:
    with Client(cluster.address, timeout_s=120) as client, Traffic(cluster.address, answers, num_users=3) as traffic:
        traffic.flow()
        first = set(members(client.status(), "decode"))
        before = groups("CREATED")

        # No room: a placement group is pending, other changes go on, and another size takes the demand back.
        with scaling(client, decode=3) as refused:
            wait_until(lambda: groups("PENDING") == 2, 30, "two placement groups are pending")
            wait_until(lambda: DECODE_PLACES in client.status().waiting_for, 30, "the status tells")
            client.scale(prefill=2)
            client.scale(decode=1)
        (refusal,) = refused
        assert "asked for another size" in str(refusal)
        assert groups("PENDING") == 0
        assert client.status().waiting_for == ""
        client.scale(prefill=1)

        # A node comes, and serves.
        with scaling(client, decode=2) as refused:
            wait_until(lambda: groups("PENDING") == 1, 30, "a placement group is pending")
            node = add_node(nodes)
        assert refused == []
        (added,) = set(members(client.status(), "decode")) - first
        assert members(client.status(), "decode")[added].node_id == node.node_id
        wait_until(lambda: members(client.status(), "decode")[added].tokens > 0, 60, "it computes tokens")

        # It is given back, and may go.
        client.scale(decode=1)
        wait_until(lambda: free() == 1 and groups("CREATED") == before, 30, "nothing is reserved on the node")
        nodes.remove_node(node)
        traffic.flow()
        assert client.status().state == "READY"
        assert client.status().requests_failed == 0


def test_a_node_that_is_lost_costs_no_token(nodes: Cluster, cluster: RunningCluster, answers: Answers) -> None:
    with Client(cluster.address, timeout_s=120) as client:
        node = add_node(nodes)
        client.scale(decode=2)
        with Traffic(cluster.address, answers, num_users=4) as traffic:
            traffic.flow()
            traffic.longest_gap_s()
            (raylet,) = [p.process.pid for p in node.all_processes["raylet"]]
            killed_s = time.monotonic()
            os.kill(raylet, signal.SIGKILL)
            wait_until(lambda: len(members(client.status(), "decode")) == 1, _LOSS_S, "the cluster goes on without it")
            gone_s = time.monotonic() - killed_s
            traffic.flow()
            print(f"without the node after {gone_s:.2f} s; longest gap {traffic.longest_gap_s():.2f} s")
            # Nothing has room for another, which holds up no other change.
            wait_until(lambda: groups("PENDING") == 1, 30, "a placement group is pending")
            assert client.status().state == "DEGRADED"
            client.scale(decode=1)
            wait_until(lambda: settled(client, decode=1), 30, "as few are enough")
        assert client.status().requests_failed == 0
        assert groups("PENDING") == 0
        wait_until(lambda: at_baseline(client.status()), 30, "pages back to baseline")
