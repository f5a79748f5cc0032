"""The weights that an attention worker holds, fused for fewer GEMMs.

Shapes: `H` hidden, `V` vocabulary, `Q` and `N` query and KV heads, `D` head dim, `E` experts, `I` intermediate.
"""

from __future__ import annotations

import dataclasses

import torch

from model.census import attention_tensors
from model.checkpoint import Checkpoint, LoadProgress
from model.config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    gate_up: torch.Tensor
    """`[2I, H]`"""
    down: torch.Tensor
    """`[H, I]`"""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateWeights:
    """The router's gate, always fp32."""

    weight: torch.Tensor
    """`[E, H]`"""
    correction_bias: torch.Tensor
    """`[E]`, added to the scores only to choose experts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    qkv: torch.Tensor
    """`[(Q + 2N) · D, H]`"""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: torch.Tensor
    """`[H, Q · D]`"""
    mlp: MlpWeights
    """The dense feed-forward, or the shared expert of a mixture-of-experts layer."""
    gate: GateWeights | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """Everything but the routed experts."""

    embedding: torch.Tensor
    """`[V, H]`"""
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: torch.Tensor
    """`[V, H]`; the embedding itself where they are tied."""


def load_attention_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None = None
) -> AttentionWeights:
    """Raises: CheckpointError."""
    return _Loader(checkpoint, dtype, device, progress).load()


class _Loader:
    """Allocates the fused tensors, lets the checkpoint fill their slices, and names the parts."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._progress = checkpoint, dtype, device, progress
        self._shapes = attention_tensors(checkpoint.config)
        self._into: dict[str, torch.Tensor] = {}

    def load(self) -> AttentionWeights:
        config = self._checkpoint.config
        embedding = self._one("model.embed_tokens.weight")
        weights = AttentionWeights(
            embedding=embedding,
            layers=tuple(self._layer(config, layer) for layer in range(config.num_hidden_layers)),
            norm=self._one("model.norm.weight"),
            lm_head=embedding if config.tie_word_embeddings else self._one("lm_head.weight"),
        )
        assert self._into.keys() == self._shapes.keys(), "every tensor of the census has a place"
        self._checkpoint.read(self._into, self._dtype, into=self._into, progress=self._progress)
        return weights

    def _layer(self, config: ModelConfig, layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        sparse = layer in config.moe_layers
        shared = mlp + "shared_experts." if sparse else mlp
        qkv = [f"{attention}{part}_proj" for part in "qkv"]
        return LayerWeights(
            input_norm=self._one(prefix + "input_layernorm.weight"),
            post_attention_norm=self._one(prefix + "post_attention_layernorm.weight"),
            qkv=self._fused([name + ".weight" for name in qkv]),
            qkv_bias=self._fused([name + ".bias" for name in qkv]) if config.attention_bias else None,
            q_norm=self._one(attention + "q_norm.weight") if config.use_qk_norm else None,
            k_norm=self._one(attention + "k_norm.weight") if config.use_qk_norm else None,
            o=self._one(attention + "o_proj.weight"),
            mlp=MlpWeights(
                gate_up=self._fused([shared + "gate_proj.weight", shared + "up_proj.weight"]),
                down=self._one(shared + "down_proj.weight"),
            ),
            gate=self._gate(mlp + "gate.") if sparse else None,
        )

    def _gate(self, prefix: str) -> GateWeights:
        return GateWeights(
            weight=self._one(prefix + "weight", torch.float32),
            correction_bias=self._one(prefix + "e_score_correction_bias", torch.float32),
        )

    def _one(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=dtype or self._dtype, device=self._device)
        self._into[name] = tensor
        return tensor

    def _fused(self, names: list[str]) -> torch.Tensor:
        """The named tensors stacked along their first dim."""
        sizes = [self._shapes[name][0] for name in names]
        fused = torch.empty((sum(sizes), *self._shapes[names[0]][1:]), dtype=self._dtype, device=self._device)
        self._into.update(zip(names, torch.split(fused, sizes), strict=True))
        return fused
