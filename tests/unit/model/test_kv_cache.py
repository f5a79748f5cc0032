from __future__ import annotations

import json
import pathlib

import pytest
import torch

from model import kv_cache
from model.census import take_census
from model.config import ModelConfig, read_config
from model.kv_cache import KvCache

NUM_LAYERS, NUM_PAGES, PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM = 3, 6, 4, 2, 8


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ModelConfig:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": 16,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return read_config(tmp_path)


@pytest.fixture
def cache(config: ModelConfig) -> KvCache:
    return new_cache(config)


def new_cache(config: ModelConfig, dtype: torch.dtype = torch.float32) -> KvCache:
    return KvCache(config, NUM_PAGES, PAGE_SIZE, dtype, torch.device("cpu"))


def filled(cache: KvCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Write every slot of a layer; the keys and values by slot."""
    shape = (NUM_PAGES * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    k, v = torch.randn(shape), torch.randn(shape)
    cache.write(layer, k, v, torch.arange(len(k)))
    return k, v


def test_gather_returns_the_slots_in_the_order_asked_for(cache: KvCache) -> None:
    k, v = filled(cache, 1)
    slots = torch.tensor([17, 3, 8])
    found_k, found_v = cache.gather(1, slots)
    assert found_k.equal(k[slots])
    assert found_v.equal(v[slots])


def test_layers_are_apart(cache: KvCache) -> None:
    filled(cache, 1)
    assert not cache.gather(0, torch.arange(NUM_PAGES * PAGE_SIZE))[0].any()
    assert not cache.gather(2, torch.arange(NUM_PAGES * PAGE_SIZE))[0].any()


def test_gather_pages_returns_whole_pages_by_sequence(cache: KvCache) -> None:
    k, v = filled(cache, 2)
    slots = torch.tensor([[20, 21, 22, 23, 0, 1, 2, 3], [4, 5, 6, 7, 12, 13, 14, 15]])
    found_k, found_v = cache.gather_pages(2, torch.tensor([[5, 0], [1, 3]]))
    assert found_k.equal(k[slots])
    assert found_v.equal(v[slots])


def test_a_slot_written_again_holds_the_later_values(cache: KvCache) -> None:
    filled(cache, 0)
    k, v = filled(cache, 0)
    assert cache.gather(0, torch.arange(len(k)))[0].equal(k)
    assert cache.gather(0, torch.arange(len(v)))[1].equal(v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exported_pages_arrive_as_bytes_at_other_page_numbers(config: ModelConfig, dtype: torch.dtype) -> None:
    source, target = new_cache(config, dtype), new_cache(config, dtype)
    for layer in range(NUM_LAYERS):
        shape = (NUM_PAGES * PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
        source.write(layer, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.arange(shape[0]))
    target.import_pages([1, 4, 2], source.export_pages([5, 0, 3]).reshape(-1).view(torch.uint8))
    for layer in range(NUM_LAYERS):
        sent = source.gather_pages(layer, torch.tensor([[5, 0, 3]]))
        came = target.gather_pages(layer, torch.tensor([[1, 4, 2]]))
        assert sent[0].equal(came[0])
        assert sent[1].equal(came[1])


def test_an_import_leaves_other_pages_alone(config: ModelConfig, cache: KvCache) -> None:
    k, _ = filled(cache, 0)
    cache.import_pages([2], new_cache(config).export_pages([0]))
    slots = torch.tensor([slot for slot in range(len(k)) if slot // PAGE_SIZE != 2])
    assert cache.gather(0, slots)[0].equal(k[slots])


def test_an_export_is_a_copy(cache: KvCache) -> None:
    """The step after may write the page while the export is being sent."""
    filled(cache, 0)
    exported = cache.export_pages([0])
    before = exported.clone()
    filled(cache, 0)
    assert exported.equal(before)


def test_parts_are_bounded_and_keep_the_order(cache: KvCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_PART_BYTES", 2 * cache.page_bytes())
    assert list(cache.parts([5, 0, 3, 1, 4])) == [[5, 0], [3, 1], [4]]
    monkeypatch.setattr(kv_cache, "_PART_BYTES", 1)
    assert list(cache.parts([5, 0])) == [[5], [0]]


def test_a_page_is_copied_in_all_layers(cache: KvCache) -> None:
    for layer in range(NUM_LAYERS):
        filled(cache, layer)
    cache.copy_page(1, 4)
    assert cache.export_pages([4]).equal(cache.export_pages([1]))


def test_page_bytes_are_those_of_an_exported_page(cache: KvCache) -> None:
    assert (
        cache.page_bytes() == cache.export_pages([0]).nbytes == 4 * NUM_LAYERS * 2 * PAGE_SIZE * NUM_KV_HEADS * HEAD_DIM
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_takes_what_the_census_says(config: ModelConfig, dtype: torch.dtype) -> None:
    """The figure that `octet check` prints."""
    cache = new_cache(config, dtype)
    per_token = take_census(config, 2, dtype.itemsize).kv_bytes_per_token
    # Every layer is a view of the one tensor.
    assert cache.of_layer(0)[0].untyped_storage().nbytes() == NUM_PAGES * PAGE_SIZE * per_token
    assert cache.page_bytes() == PAGE_SIZE * per_token


def test_unwritten_slots_are_finite(cache: KvCache) -> None:
    """They are masked, but NaN · 0 would spread."""
    assert cache.export_pages(range(NUM_PAGES)).isfinite().all()
