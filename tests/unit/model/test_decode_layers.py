"""Compiled decode layers against the operators that prefill uses: the same bits, whatever shares the work."""

from __future__ import annotations

import pathlib
import random

import pytest
import torch

from model.batch import Span
from model.linear import linear
from model.pages import PagePool
from tests.unit.model.subject import MODELS, NUM_PAGES, PAGE, Scaled, Subject, build


def by_operators(subject: Subject) -> torch.Tensor:
    """As a batch that also holds a prompt is computed."""
    transformer = subject.transformer
    transformer._decode_layers = None
    return transformer.forward([subject.batch], Scaled())[0]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the operators: with more they compute SwiGLU in torch."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("lengths", [(1,), (9, 2), (31, 5, 17, 1, 8, 40, 3, 3, 22)], ids=["one", "two", "many"])
@pytest.mark.parametrize("model", MODELS)
def test_hidden_states_and_cache_equal_those_of_the_operators_bit_for_bit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, model: str, lengths: tuple[int, ...], num_threads: int
) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    spans = []
    for length in lengths:
        pages = pool.allocate(pool.pages_for(length))
        assert pages is not None
        spans.append(Span(token_ids=[random.randrange(90)], start=length - 1, pages=pages))
    with monkeypatch.context() as threads:
        threads.setattr(torch, "get_num_threads", lambda: num_threads)
        subject = build(tmp_path, model, spans, pool)
    kv = subject.cache.export_pages(range(NUM_PAGES))
    found = subject.transformer.forward([subject.batch], Scaled())[0]
    found_kv = subject.cache.export_pages(range(NUM_PAGES))
    assert not torch.equal(found_kv, kv)
    subject.cache.import_pages(range(NUM_PAGES), kv)
    assert torch.equal(found, by_operators(subject))
    assert torch.equal(found_kv, subject.cache.export_pages(range(NUM_PAGES)))


def test_tokens_of_one_sequence_see_each_other(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    pages = pool.allocate(pool.pages_for(20))
    assert pages is not None
    subject = build(tmp_path, "plain", [Span(token_ids=[5, 6, 7], start=11, pages=pages, by_token=True)], pool)
    found = subject.transformer.forward([subject.batch], Scaled())[0]
    assert torch.equal(found, by_operators(subject))


def test_logits_are_the_output_heads_product(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    subject = build(tmp_path, "partial_panels", [Span(token_ids=[5], start=0, pages=pool.allocate(1) or [])], pool)
    hidden_TH = torch.randn(7, 40)
    head = subject.transformer._weights.lm_head
    assert torch.equal(subject.transformer.logits(hidden_TH), linear(hidden_TH, head))
