"""Compiled decode layers against the operators that prefill uses: the same bits, whatever shares the work."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.batch import Batch, Span, build_batch
from model.census import required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from model.kv_cache import KvCache
from model.linear import linear
from model.pages import PagePool
from model.transformer import Transformer
from model.weights import load_attention_weights

PAGE, NUM_PAGES = 4, 64
CPU = torch.device("cpu")

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_norms_no_bias": {"use_qk_norm": False, "attention_bias": False},
    "partial_panels": {"hidden_size": 40, "head_dim": 8, "intermediate_size": 24, "vocab_size": 90},
    "tied": {"tie_word_embeddings": True},
}


class Scaled:
    """Routed experts that answer at once."""

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        return x_TH * (layer + 0.5)

    def combine(self, pending: torch.Tensor) -> torch.Tensor:
        return pending

    def settle(self) -> None:
        return

    def drain(self) -> None:
        return


@dataclasses.dataclass(frozen=True)
class Subject:
    transformer: Transformer
    cache: KvCache
    batch: Batch


def build(tmp_path: pathlib.Path, model: str, spans: list[Span], pool: PagePool) -> Subject:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 100,
        "hidden_size": 48,
        "intermediate_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
        **MODELS[model],
    }
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    shapes = required_tensors(config)
    save_file({name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    weights = load_attention_weights(Checkpoint.open(tmp_path), torch.float32, CPU)
    cache = KvCache(config, NUM_PAGES, PAGE, torch.float32, CPU)
    for layer in range(config.num_hidden_layers):
        for part in cache.of_layer(layer):
            part.normal_()
    return Subject(Transformer(config, weights, cache, 256), cache, build_batch(spans, pool, CPU)[0])


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
