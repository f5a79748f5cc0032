"""How a runner cuts its steps."""

from __future__ import annotations

import pathlib
import random

import torch

from model.batch import Span
from model.pages import PagePool
from model.runner import ModelRunner
from tests.unit.model.subject import CPU, NUM_PAGES, PAGE, Counting, build


def test_micro_batches_take_turns_where_there_are_cores_for_both(tmp_path: pathlib.Path) -> None:
    pool, routed = PagePool(NUM_PAGES, PAGE), Counting()
    pages = pool.allocate(pool.pages_for(20))
    assert pages is not None
    span = Span(token_ids=random.choices(range(90), k=20), start=0, pages=pages)
    subject, cores = build(tmp_path, "plain", [span], pool), [True]
    runner = ModelRunner(
        subject.transformer,
        routed,
        pool,
        subject.cache,
        CPU,
        ping_pong_rows=20,
        takes_turns=lambda: cores[-1],
    )
    (halves_TH,) = runner.run([span])
    assert {rows for _, rows in routed.rows} == {10}
    cores.append(False)
    routed.rows.clear()
    (whole_TH,) = runner.run([span])
    assert {rows for _, rows in routed.rows} == {20}
    assert torch.equal(halves_TH, whole_TH)
