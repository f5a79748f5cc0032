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


class Joined:
    """A link of which it is noted what becomes of it."""

    def __init__(self) -> None:
        self.aborted = self.closed = 0

    def abort(self) -> None:
        self.aborted += 1

    def close(self) -> None:
        self.closed += 1


def relinked() -> tuple[WireLanes, Joined, Joined, Joined]:
    """One shard whose link has been replaced, as when a lane is formed anew, and is still in use; and another."""
    lanes = WireLanes(WorkerId("decode-0"), "decode", make_plan(load_config()), Mock(), "127.0.0.1")
    old, new, other = Joined(), Joined(), Joined()
    lanes._links = {SHARDS[0]: new, SHARDS[1]: other}  # type: ignore[dict-item]
    lanes._replaced = [(SHARDS[0], old)]  # type: ignore[list-item]
    return lanes, old, new, other


def test_whoever_waits_for_a_shard_that_is_lost_hears_so_over_whichever_link() -> None:
    lanes, old, new, other = relinked()
    lanes.give_up([SHARDS[0]])
    assert (old.aborted, new.aborted, other.aborted) == (1, 1, 0)


def test_what_nobody_uses_any_more_is_closed_once() -> None:
    lanes, old, new, other = relinked()
    lanes.unlink(others_than=[SHARDS[0]])
    assert (old.closed, new.closed, other.closed) == (1, 0, 1)
    lanes.unlink(others_than=())
    assert (old.closed, new.closed, other.closed) == (1, 1, 1)
