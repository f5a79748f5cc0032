"""The last layer computes what is wanted: the same as when everything is, and nothing for the others but their KV."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import pytest
import torch

from model.batch import Span, Wanted, build_batch
from model.pages import PagePool
from tests.unit.model.subject import CPU, MODELS, NUM_PAGES, PAGE, Counting, Subject, build

_LAST_LAYER = 2


def spans_of(pool: PagePool, *lengths: tuple[int, int]) -> list[Span]:
    """(tokens that are there already, tokens to compute) of each; single ones are an answer's."""
    spans = []
    for start, count in lengths:
        pages = pool.allocate(pool.pages_for(start + count))
        assert pages is not None
        token_ids = random.choices(range(90), k=count)
        spans.append(Span(token_ids=token_ids, start=start, pages=pages, by_token=count == 1))
    return spans


def run(
    subject: Subject, pool: PagePool, spans: list[Span], wanted: list[Wanted]
) -> tuple[list[torch.Tensor], torch.Tensor, list[tuple[int, int]]]:
    """Hidden states of each span, all keys and values, and what experts were asked."""
    batch, rows = build_batch(
        [dataclasses.replace(span, wanted=each) for span, each in zip(spans, wanted, strict=True)], pool, CPU
    )
    routed = Counting()
    (hidden_TH,) = subject.transformer.forward([batch], routed)
    return [hidden_TH[each] for each in rows], subject.cache.export_pages(range(NUM_PAGES)), routed.rows


@pytest.mark.parametrize("model", MODELS)
def test_a_wanted_token_is_as_it_is_among_all(tmp_path: pathlib.Path, model: str) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    spans = spans_of(pool, (0, 9), (13, 1), (6, 30), (3, 5))
    subject = build(tmp_path, model, spans, pool)
    whole, kv, asked = run(subject, pool, spans, ["all"] * 4)
    found, found_kv, found_asked = run(subject, pool, spans, ["last", "last", "none", "last"])
    assert torch.equal(found_kv, kv)
    assert [len(hidden_WH) for hidden_WH in found] == [1, 1, 0, 1]
    for index in (0, 1, 3):
        torch.testing.assert_close(found[index], whole[index][-1:], rtol=1e-4, atol=1e-4)
    assert asked[-1] == (_LAST_LAYER, 45)
    assert found_asked == [*asked[:-1], (_LAST_LAYER, 3)]


def test_what_nobody_wants_asks_no_expert_of_the_last_layer(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    spans = spans_of(pool, (0, 9), (4, 1))
    subject = build(tmp_path, "plain", spans, pool)
    _, kv, _ = run(subject, pool, spans, ["all"] * 2)
    found, found_kv, asked = run(subject, pool, spans, ["none"] * 2)
    assert torch.equal(found_kv, kv)
    assert [len(hidden_WH) for hidden_WH in found] == [0, 0]
    assert _LAST_LAYER not in dict(asked)


def test_a_wanted_token_does_not_depend_on_how_its_prompt_is_cut(tmp_path: pathlib.Path) -> None:
    """Bit for bit: an answer is the same after its prompt was computed again in other chunks."""
    pool = PagePool(NUM_PAGES, PAGE)
    (span,) = spans_of(pool, (0, 40))
    subject = build(tmp_path, "plain", [span], pool)
    ((expected_1H,), kv, _) = run(subject, pool, [span], ["last"])
    cut = random.choice((1, random.randrange(2, 39), 39))
    first = dataclasses.replace(span, token_ids=span.token_ids[:cut])
    second = dataclasses.replace(span, token_ids=span.token_ids[cut:], start=cut)
    run(subject, pool, [first], ["none"])
    ((found_1H,), found_kv, _) = run(subject, pool, [second], ["last"])
    assert torch.equal(found_kv, kv)
    assert torch.equal(found_1H, expected_1H)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 0.05)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_torchs_operators_compute_what_is_wanted_of_prompts_in_chunks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, model: str, dtype: torch.dtype, tolerance: float
) -> None:
    """As GPUs do, without compiled layers: of one prompt alone and of several, also where a chunk is a single token."""
    # What lies before a chunk is several blocks of keys, as it is in a long prompt.
    monkeypatch.setattr("model.attention.BLOCK_TOKENS", 2 * PAGE)
    pool = PagePool(NUM_PAGES, PAGE)
    prompts = [dataclasses.replace(span, by_token=False) for span in spans_of(pool, (0, 1), (0, 2), (0, 37), (0, 24))]
    subject = build(tmp_path, model, prompts, pool, dtype)
    assert subject.transformer._compiled is None
    empty = subject.cache.export_pages(range(NUM_PAGES))
    whole, kv, _ = run(subject, pool, prompts, ["all"] * len(prompts))
    expected = {id(span): hidden_TH[-1:] for span, hidden_TH in zip(prompts, whole, strict=True)}
    for size in (64, 7, 1):
        subject.cache.import_pages(range(NUM_PAGES), empty)
        for done in range(0, max(len(span.token_ids) for span in prompts), size):
            ahead = [span for span in prompts if len(span.token_ids) > done]
            parts = [dataclasses.replace(span, token_ids=span.token_ids[done:][:size], start=done) for span in ahead]
            ends = [part.stop == len(span.token_ids) for part, span in zip(parts, ahead, strict=True)]
            found, found_kv, asked = run(subject, pool, parts, ["last" if last else "none" for last in ends])
            assert dict(asked).get(_LAST_LAYER, 0) == sum(ends)
            for span, last, hidden_WH in zip(ahead, ends, found, strict=True):
                wanted = expected[id(span)] if last else hidden_WH[:0]
                torch.testing.assert_close(hidden_WH, wanted, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found_kv, kv, rtol=tolerance, atol=tolerance)
