"""Lanes over wires, as a plan has them."""

from __future__ import annotations

import os
from unittest.mock import Mock

import pytest

from cluster.members import Role
from cluster.planning import make_plan
from cluster.workers.lanes import WireLanes, frame_layout
from octet.config import load_config
from octet.ids import Epoch, WorkerId
from router.link import Link
from tests.exchange_conformance import PATIENT_S, form_pair

SHARDS = [WorkerId("experts-0"), WorkerId("experts-1")]


@pytest.mark.parametrize(
    ("role", "cores", "threads", "elsewhere", "crowded"),
    [
        ("prefill", 2, 1, False, True),
        ("prefill", 3, 1, False, False),
        ("prefill", 3, 2, False, True),
        ("prefill", 2, 1, True, False),
        ("decode", 2, 1, False, False),
    ],
)
def test_prompts_leave_the_cores_to_shards_that_need_them_all(
    role: Role, cores: int, threads: int, elsewhere: bool, crowded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(load_config(None, [f"pools.experts.size={len(SHARDS)}", f"pools.experts.threads={threads}"]))
    lanes = WireLanes(WorkerId(f"{role}-0"), role, plan, Mock(), "127.0.0.1")
    pairs = [form_pair(PATIENT_S) for _ in SHARDS]
    pairs[1][0].within_host = not elsewhere
    layout = frame_layout(role, plan)
    lanes._links = {shard: Link(worker, layout, Epoch(1)) for shard, (worker, _) in zip(SHARDS, pairs, strict=True)}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert lanes.exchange(SHARDS).crowded == crowded
    for _, shard in pairs:
        shard.abort()
