"""What a frontend does is on record, and the record is what the checker takes."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import pytest

from octet.config import ChaosConfig
from octet.errors import TraceError
from ops.chaos.checker import check
from ops.chaos.commits import AuditTrail
from tests.unit.cluster.played import PLAN, playing, token
from tests.unit.ops.chaos.histories import journal


async def test_every_commit_of_a_frontend_is_on_record(tmp_path: pathlib.Path) -> None:
    chaos = ChaosConfig(audit_dir=str(tmp_path))
    plan = dataclasses.replace(PLAN, config=PLAN.config.model_copy(update={"chaos": chaos}))
    async with playing(plan) as cluster:
        client, request = await cluster.admitted()
        cluster.prefill.tell(token(request, 0, 100))
        await client.heard(1)
        cluster.decode.tell(token(request, 1, 101), token(request, 1, 101), token(request, 2, 102, "length"))
        await client.end()
        second = cluster.new_worker("decode-1")
        cluster.set_workers([cluster.prefill], [second])
    commits = AuditTrail(tmp_path).read()
    assert [(commit.kind, commit.index, commit.worker) for commit in commits if commit.kind == "commit"] == [
        ("commit", 0, "prefill-0"),
        ("commit", 1, "decode-0"),
        ("commit", 2, "decode-0"),
    ]
    assert [commit.workers for commit in commits if commit.kind == "workers"] == [
        ("decode-0", "prefill-0"),
        ("decode-1", "prefill-0"),
    ]
    assert [commit.outcome for commit in commits if commit.kind == "end"] == ["finished"]
    assert check(journal(*commits)) == []


def test_what_was_read_is_not_read_again_but_who_serves_is_told(tmp_path: pathlib.Path) -> None:
    file, trail = tmp_path / "1-frontend-0-5.jsonl", AuditTrail(tmp_path)
    file.write_text(
        '{"kind":"workers","at_s":1,"workers":["decode-0"]}\n'
        '{"kind":"accept","at_s":2,"request_id":"old","received":[0]}\n'
    )
    assert [commit.kind for commit in trail.read()] == ["workers", "accept"]
    with file.open("a") as more:
        more.write('{"kind":"end","at_s":6,"request_id":"old","outcome":"finished"}\n')
    found = trail.read()
    assert [(commit.kind, commit.workers) for commit in found] == [("workers", ("decode-0",)), ("end", ())]


def test_half_a_line_of_a_killed_frontend_is_left_out_and_any_other_is_refused(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "1-frontend-0-5.jsonl"
    file.write_text('{"kind":"workers","at_s":1,"workers":["decode-0"]}\n{"kind":"acc')
    assert [commit.kind for commit in AuditTrail(tmp_path).read()] == ["workers"]
    file.write_text('{"kind":"acc\n{"kind":"workers","at_s":1,"workers":["decode-0"]}\n')
    with pytest.raises(TraceError, match="acc"):
        AuditTrail(tmp_path).read()


def test_frontends_come_in_the_order_in_which_they_wrote_whatever_their_clocks_said(tmp_path: pathlib.Path) -> None:
    for at_s, name in enumerate(("9-frontend-0-5.jsonl", "1-frontend-0-6.jsonl")):
        file = tmp_path / name
        file.write_text('{"kind":"workers","at_s":1,"workers":["decode-0"]}\n')
        os.utime(file, (at_s, at_s))
    assert [commit.frontend for commit in AuditTrail(tmp_path).read()] == ["9-frontend-0-5", "1-frontend-0-6"]
