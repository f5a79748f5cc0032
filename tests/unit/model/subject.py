"""A transformer of random weights, small enough to be made anew for each test."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import torch
from safetensors.torch import save_file

from model.batch import Batch, Span, build_batch
from model.census import required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from model.kv_cache import KvCache
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
    # Three query heads of eight: keys begin in the midst of a panel of sixteen columns.
    "keys_within_a_panel": {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
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


class Counting(Scaled):
    """Notes how many rows each layer's experts are asked for."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> torch.Tensor:
        self.rows.append((layer, len(x_TH)))
        return super().dispatch(layer, x_TH)


@dataclasses.dataclass(frozen=True)
class Subject:
    transformer: Transformer
    cache: KvCache
    batch: Batch


def build(
    tmp_path: pathlib.Path, model: str, spans: list[Span], pool: PagePool, dtype: torch.dtype = torch.float32
) -> Subject:
    """With layers that are compiled in fp32, and torch's operators in any other `dtype`."""
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
    weights = load_attention_weights(Checkpoint.open(tmp_path), dtype, CPU)
    cache = KvCache(config, NUM_PAGES, PAGE, dtype, CPU)
    for layer in range(config.num_hidden_layers):
        for part in cache.of_layer(layer):
            part.normal_()
    return Subject(Transformer(config, weights, cache, 256), cache, build_batch(spans, pool, CPU)[0])
