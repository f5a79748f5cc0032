"""The weights that an attention worker holds, fused for fewer GEMMs.

Shapes: `H` hidden, `V` vocabulary, `Q` and `N` query and KV heads, `D` head dim, `E` experts, `I` intermediate.
"""

from __future__ import annotations

import dataclasses

import torch

from model.census import Shapes, attention_tensors, draft_tensors
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.linear import Matrix, MlpWeights, Packer, packs
from model.load_progress import LoadProgress


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GateWeights:
    """The router's gate, always fp32."""

    weight: Matrix
    """`[E, H]`"""
    correction_bias: torch.Tensor
    """`[E]`, added to the scores only to choose experts."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    qkv: Matrix
    """`[(Q + 2N) · D, H]`"""
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    o: Matrix
    """`[H, Q · D]`"""
    mlp: MlpWeights
    """The dense feed-forward, or the shared expert of a mixture-of-experts layer."""
    gate: GateWeights | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AttentionWeights:
    """Everything but the routed experts."""

    embedding: Matrix
    """`[V, H]`"""
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor
    lm_head: Matrix
    """`[V, H]`; the embedding itself where they are tied."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MtpWeights:
    """The first multi-token-prediction layer without its routed experts.

    Embedding and output head are the model's own. Checkpoints that repeat them in the layer hold copies.
    """

    embedding_norm: torch.Tensor
    """`enorm`"""
    hidden_norm: torch.Tensor
    """`hnorm`"""
    join: Matrix
    """`eh_proj`, `[H, 2H]`: the embedding's part, then the hidden state's."""
    layer: LayerWeights
    norm: torch.Tensor
    """`shared_head.norm`"""


def load_attention_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None = None
) -> AttentionWeights:
    """Raises: CheckpointError."""
    return _Loader(checkpoint, attention_tensors(checkpoint.config), dtype, device, progress).load()


def load_mtp_weights(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, progress: LoadProgress | None = None
) -> MtpWeights:
    """Raises: CheckpointError where the checkpoint has no MTP layer."""
    return _Loader(checkpoint, draft_tensors(checkpoint.config), dtype, device, progress).load_mtp()


def gates_of(weights: AttentionWeights, mtp: MtpWeights | None = None) -> dict[int, GateWeights]:
    """The gates by layer, of the MTP layer too if there is one."""
    layers = (*weights.layers, *([mtp.layer] if mtp is not None else []))
    return {index: layer.gate for index, layer in enumerate(layers) if layer.gate is not None}


class _Loader:
    """Allocates the fused tensors, lets the checkpoint fill their slices, and names the parts."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        shapes: Shapes,
        dtype: torch.dtype,
        device: torch.device,
        progress: LoadProgress | None,
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._progress = checkpoint, dtype, device, progress
        self._shapes = shapes
        self._into: dict[str, torch.Tensor] = {}
        self._packer = Packer() if packs(dtype, device) else None

    def load(self) -> AttentionWeights:
        config = self._checkpoint.config
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        lm_head = self._matrix([head])
        weights = AttentionWeights(
            embedding=lm_head if config.tie_word_embeddings else self._one("model.embed_tokens.weight"),
            layers=tuple(self._layer(config, layer) for layer in range(config.num_hidden_layers)),
            norm=self._one("model.norm.weight"),
            lm_head=lm_head,
        )
        self._read()
        return weights

    def load_mtp(self) -> MtpWeights:
        config = self._checkpoint.config
        prefix = f"model.layers.{config.num_hidden_layers}."
        weights = MtpWeights(
            embedding_norm=self._one(prefix + "enorm.weight"),
            hidden_norm=self._one(prefix + "hnorm.weight"),
            join=self._matrix([prefix + "eh_proj.weight"]),
            layer=self._layer(config, config.num_hidden_layers),
            norm=self._one(prefix + "shared_head.norm.weight"),
        )
        self._read()
        return weights

    def _read(self) -> None:
        assert self._into.keys() == self._shapes.keys(), "every tensor of the census has a place"
        self._checkpoint.read(self._into, self._dtype, into=self._into, progress=self._progress)
        if self._packer is not None:
            self._packer.pack()

    def _layer(self, config: ModelConfig, layer: int) -> LayerWeights:
        prefix = f"model.layers.{layer}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        sparse = layer in config.moe_layers or layer in config.mtp_layers
        shared = mlp + "shared_experts." if sparse else mlp
        qkv = [f"{attention}{part}_proj" for part in "qkv"]
        return LayerWeights(
            input_norm=self._one(prefix + "input_layernorm.weight"),
            post_attention_norm=self._one(prefix + "post_attention_layernorm.weight"),
            qkv=self._matrix([name + ".weight" for name in qkv]),
            qkv_bias=self._fused([name + ".bias" for name in qkv]) if config.attention_bias else None,
            q_norm=self._one(attention + "q_norm.weight") if config.use_qk_norm else None,
            k_norm=self._one(attention + "k_norm.weight") if config.use_qk_norm else None,
            o=self._matrix([attention + "o_proj.weight"]),
            mlp=self._mlp(shared),
            gate=self._gate(mlp + "gate.") if sparse else None,
        )

    def _gate(self, prefix: str) -> GateWeights:
        return GateWeights(
            weight=self._matrix([prefix + "weight"], torch.float32),
            correction_bias=self._one(prefix + "e_score_correction_bias", torch.float32),
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        gate, up, down = (f"{prefix}{part}_proj.weight" for part in ("gate", "up", "down"))
        if self._packer is None:
            gate_up: Matrix = self._fused([gate, up])
        else:
            gate_up, views = self._packer.pair(*self._shapes[gate])
            self._into.update(zip((gate, up), views, strict=True))
        return MlpWeights(gate_up=gate_up, down=self._matrix([down]))

    def _matrix(self, names: list[str], dtype: torch.dtype | None = None) -> Matrix:
        """The named matrices stacked along their first dim, to be multiplied with."""
        if self._packer is None:
            return self._fused(names, dtype)
        rows = [self._shapes[name][0] for name in names]
        matrix, filled = self._packer.matrix(sum(rows), self._shapes[names[0]][1])
        self._into.update(zip(names, torch.split(filled, rows), strict=True))
        return matrix

    def _one(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(self._shapes[name], dtype=dtype or self._dtype, device=self._device)
        self._into[name] = tensor
        return tensor

    def _fused(self, names: list[str], dtype: torch.dtype | None = None) -> torch.Tensor:
        """The named tensors stacked along their first dim."""
        sizes = [self._shapes[name][0] for name in names]
        shape = (sum(sizes), *self._shapes[names[0]][1:])
        fused = torch.empty(shape, dtype=dtype or self._dtype, device=self._device)
        self._into.update(zip(names, torch.split(fused, sizes), strict=True))
        return fused
