"""Compiled layers against torch's operators; and the same bits, however many threads share the work."""

from __future__ import annotations

import dataclasses
import pathlib
import random

import pytest
import torch

from model import layer_cpu
from model.batch import Span, WantedRows
from model.compiled_layers import CompiledLayers
from model.linear import PANEL, Packer, linear
from model.linear_cpu import ROWS
from model.pages import PagePool
from model.team_cpu import Team
from tests.unit.model.subject import MODELS, NUM_PAGES, PAGE, Scaled, Subject, build


def computed(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the cache with them; then it is as it was."""
    kv = subject.cache.export_pages(range(NUM_PAGES))
    hidden_TH = subject.transformer.forward([subject.batch], Scaled())[0]
    written = subject.cache.export_pages(range(NUM_PAGES))
    subject.cache.import_pages(range(NUM_PAGES), kv)
    return hidden_TH, written


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless a test says otherwise."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


ONE, MANY = ((1, 0),), ((1, 30), (1, 4), (1, 16), (1, 0), (1, 7), (1, 39), (1, 2), (1, 2), (1, 21))
PROMPT, PROMPTS = ((19, 0),), ((2, 0), (37, 3), (1, 8), (12, 0), (25, 11), (1, 0))
"""Tokens and the position of the first, by sequence. Single tokens are decoded, others are prompts."""


def placed(*sequences: tuple[int, int]) -> tuple[PagePool, list[Span]]:
    pool, spans = PagePool(NUM_PAGES, PAGE), []
    for num_tokens, start in sequences:
        pages = pool.allocate(pool.pages_for(start + num_tokens))
        assert pages is not None
        token_ids = random.choices(range(90), k=num_tokens)
        spans.append(Span(token_ids=token_ids, start=start, pages=pages, by_token=num_tokens == 1))
    return pool, spans


@pytest.mark.parametrize("sequences", [ONE, MANY, PROMPT, PROMPTS], ids=["one", "many", "prompt", "prompts_and_tokens"])
@pytest.mark.parametrize("model", MODELS)
def test_hidden_states_and_cache_are_those_of_the_operators(
    tmp_path: pathlib.Path, model: str, sequences: tuple[tuple[int, int], ...]
) -> None:
    pool, spans = placed(*sequences)
    subject = build(tmp_path, model, spans, pool)
    found = computed(subject)
    assert not torch.equal(found[1], subject.cache.export_pages(range(NUM_PAGES)))
    subject.transformer._compiled = None
    torch.testing.assert_close(found, computed(subject), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("sequences", [ONE, MANY, ((50, 0), (3, 0), (71, 0)), PROMPTS])
@pytest.mark.parametrize("model", MODELS)
def test_threads_that_share_a_batch_change_no_bit_of_it(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    sequences: tuple[tuple[int, int], ...],
    num_threads: int,
) -> None:
    pool, spans = placed(*sequences)
    subject = build(tmp_path, model, spans, pool)
    alone = computed(subject)
    # As small as the subject is, a part would be worth nothing.
    monkeypatch.setattr("model.threads._PART_OPERATIONS", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    subject.transformer._compiled = CompiledLayers(subject.transformer._config, subject.cache)
    torch.testing.assert_close(computed(subject), alone, rtol=0, atol=0)


@pytest.mark.parametrize("model", MODELS)
def test_wanted_rows_are_those_of_a_decode_step(tmp_path: pathlib.Path, model: str) -> None:
    """Bit for bit: the loops are the same, though the calls are others."""
    pool, spans = placed(*MANY)
    subject = build(tmp_path, model, spans, pool)
    transformer, batch, kv = subject.transformer, subject.batch, subject.cache.export_pages(range(NUM_PAGES))
    compiled, layer = transformer._compiled, transformer._weights.layers[0]
    assert compiled is not None
    x_TH = transformer.embed(batch)
    cos_sin = transformer._rotary.at(batch.positions_T, x_TH.dtype)
    decoded_TH = x_TH.clone()
    compiled.begin(decoded_TH, batch, cos_sin).attend(0, layer)
    decoded_kv = subject.cache.export_pages(range(NUM_PAGES))
    subject.cache.import_pages(range(NUM_PAGES), kv)
    all_of_it = dataclasses.replace(batch, wanted=WantedRows(rows_W=torch.arange(len(x_TH)), decode=batch.decode))
    assert torch.equal(compiled.wanted(x_TH, all_of_it, cos_sin).attend(0, layer), decoded_TH)
    assert torch.equal(subject.cache.export_pages(range(NUM_PAGES)), decoded_kv)


def test_tokens_of_one_sequence_see_each_other(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    pages = pool.allocate(pool.pages_for(20))
    assert pages is not None
    subject = build(tmp_path, "plain", [Span(token_ids=[5, 6, 7], start=11, pages=pages, by_token=True)], pool)
    found = computed(subject)
    subject.transformer._compiled = None
    torch.testing.assert_close(found, computed(subject), rtol=1e-4, atol=1e-4)


def test_logits_are_the_output_heads_product(tmp_path: pathlib.Path) -> None:
    pool = PagePool(NUM_PAGES, PAGE)
    span = Span(token_ids=[5], start=0, pages=pool.allocate(1) or [], by_token=True)
    subject = build(tmp_path, "partial_panels", [span], pool)
    hidden_TH = torch.randn(7, 40)
    head = subject.transformer._weights.lm_head
    assert torch.equal(subject.transformer.logits(hidden_TH), linear(hidden_TH, head))


@pytest.mark.parametrize("num_rows", [1, ROWS + 1, 2 * ROWS + 50])
def test_a_product_that_is_shared_has_all_its_blocks(num_rows: int) -> None:
    """Of two panels each, the last of which is one: as models' matrices have, which are larger than a subject's."""
    depth, columns = layer_cpu._PANEL_BYTES // (2 * PANEL * 4), 5 * PANEL - random.randrange(PANEL)
    packer = Packer()
    matrix, rows = packer.matrix(columns, depth)
    rows.normal_()
    packer.pack()
    x_TH, out_TC = torch.randn(num_rows, depth), torch.full((num_rows, columns), torch.nan)
    for size in (1, 3):
        Team(size).run(layer_cpu.project, x_TH.numpy(), matrix.panels.numpy(), out_TC.fill_(torch.nan).numpy())
        assert torch.equal(out_TC, linear(x_TH, matrix))
