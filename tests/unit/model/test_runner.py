"""How a runner cuts its steps."""

from __future__ import annotations

import pathlib
import random
from typing import cast

import pytest
import torch

from model.batch import Span, Wanted
from model.mtp import MtpHead
from model.pages import PagePool
from model.runner import ModelRunner
from octet.errors import PeerLostError
from tests.unit.model.subject import CPU, MODELS, NUM_PAGES, PAGE, Counting, Scaled, build


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


@pytest.mark.parametrize("ping_pong_rows", [None, 2])
def test_a_prompt_is_the_same_bit_for_bit_beside_one_that_is_wanted_as_a_whole(
    tmp_path: pathlib.Path, ping_pong_rows: int | None
) -> None:
    pool, spans = PagePool(NUM_PAGES, PAGE), list[Span]()
    wanted: list[Wanted] = ["none", "last", "all", "last", "all"]
    random.shuffle(wanted)
    for each in wanted:
        num_tokens = random.randint(2, 30)
        pages = pool.allocate(pool.pages_for(num_tokens))
        assert pages is not None
        spans.append(Span(token_ids=random.choices(range(90), k=num_tokens), start=0, pages=pages, wanted=each))
    subject = build(tmp_path, "plain", spans, pool)
    runner = ModelRunner(subject.transformer, Scaled(), pool, subject.cache, CPU, ping_pong_rows=ping_pong_rows)
    hidden = runner.run(spans)
    assert [len(h_TH) for h_TH in hidden] == [span.num_wanted for span in spans]
    for span, h_TH in zip(spans, hidden, strict=True):
        (alone_TH,) = runner.run([span])
        assert torch.equal(h_TH, alone_TH)


@pytest.mark.parametrize("model", MODELS)
def test_a_prompt_is_the_same_bit_for_bit_however_it_is_cut(tmp_path: pathlib.Path, model: str) -> None:
    """Also where a chunk is a single token, as the last one behind cached pages often is."""
    num_tokens = random.randint(12, 100)
    pool = PagePool(NUM_PAGES, PAGE)
    pages = pool.allocate(pool.pages_for(num_tokens))
    assert pages is not None
    token_ids = random.choices(range(90), k=num_tokens)
    subject = build(tmp_path, model, [Span(token_ids=token_ids, start=0, pages=pages)], pool)
    runner = ModelRunner(subject.transformer, Scaled(), pool, subject.cache, CPU)
    empty, computed = subject.cache.export_pages(pages), []
    for cut in ([num_tokens], [num_tokens - 1, 1], [5, 1, num_tokens - 6], [num_tokens // 2, -(-num_tokens // 2)]):
        subject.cache.import_pages(pages, empty)
        start, parts = 0, []
        for size in cut:
            parts += runner.run([Span(token_ids=token_ids[start : start + size], start=start, pages=pages)])
            start += size
        computed.append((torch.cat(parts), subject.cache.export_pages(pages)))
    for hidden_TH, kv in computed[1:]:
        assert torch.equal(kv, computed[0][1])
        assert torch.equal(hidden_TH, computed[0][0])


class Lost(Scaled):
    """Routed experts whose lane breaks, and that note when what is on its way is given up."""

    def __init__(self) -> None:
        self.drained = 0

    def combine(self, pending: torch.Tensor) -> torch.Tensor:
        raise PeerLostError("shard 0 is gone")

    def drain(self) -> None:
        self.drained += 1


def test_what_is_on_its_way_is_given_up_with_the_step_that_loses_its_lane(tmp_path: pathlib.Path) -> None:
    """Or the step that is done again would take the other one's replies for its own."""
    pool, routed = PagePool(NUM_PAGES, PAGE), Lost()
    span = Span(token_ids=random.choices(range(90), k=5), start=0, pages=pool.allocate(2) or [])
    subject = build(tmp_path, "plain", [span], pool)
    runner = ModelRunner(subject.transformer, routed, pool, subject.cache, CPU)
    with pytest.raises(PeerLostError):
        runner.run([span])
    assert routed.drained == 1


class LosesItsLane:
    """A head whose routed experts are gone while it drafts."""

    def forward(self, *_: object) -> torch.Tensor:
        raise PeerLostError("shard 0 is gone")


def test_what_is_on_its_way_is_given_up_with_the_drafts_that_lose_their_lane(tmp_path: pathlib.Path) -> None:
    pool, routed, mtp = PagePool(NUM_PAGES, PAGE), Lost(), cast("MtpHead", LosesItsLane())
    span = Span(token_ids=[random.randrange(90)], start=0, pages=pool.allocate(1) or [])
    subject = build(tmp_path, "plain", [span], pool)
    runner = ModelRunner(subject.transformer, routed, pool, subject.cache, CPU, mtp=mtp)
    with pytest.raises(PeerLostError):
        runner.draft([span], torch.zeros(1, 8))
    assert routed.drained == 1


def test_a_single_token_is_not_cut_in_two(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    span = Span(token_ids=[random.randrange(90)], start=0, pages=pool.allocate(1) or [])
    subject, hidden = build(tmp_path, "plain", [span], pool), []
    for ping_pong_rows in (None, 0, 1):
        runner = ModelRunner(subject.transformer, Scaled(), pool, subject.cache, CPU, ping_pong_rows=ping_pong_rows)
        hidden += runner.run([span])
    assert [len(h_TH) for h_TH in hidden] == [1, 1, 1]
    assert torch.equal(hidden[0], hidden[1])
    assert torch.equal(hidden[0], hidden[2])
