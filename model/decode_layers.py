"""Decoder layers over single tokens on an fp32 CPU: `model.layer_cpu` with its arrays made ready.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `D` head dim, `I` intermediate, `C` columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from model import layer_cpu
from model.batch import Batch
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.linear import PANEL, Matrix, PackedMatrix
from model.linear_cpu import swiglu
from model.team_cpu import Team
from model.threads import num_threads
from model.weights import LayerWeights

_Array = npt.NDArray[np.float32]
_NOTHING: _Array = np.empty(0, np.float32)


class DecodeLayers:
    """Computes with as many threads as torch had when it was made. Belongs to one thread."""

    def __init__(self, config: ModelConfig, cache: KvCache) -> None:
        self.config, self.cache = config, cache
        self.eps, self.scale = np.float32(config.rms_norm_eps), np.float32(config.head_dim**-0.5)
        self.team = Team(num_threads())
        self._layers: dict[int, _LayerArrays] = {}

    def layer(self, index: int, weights: LayerWeights) -> _LayerArrays:
        if index not in self._layers:
            self._layers[index] = _LayerArrays(weights, self.cache.of_layer(index))
        return self._layers[index]

    def begin(self, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]) -> DecodePass:
        return DecodePass(self, x_TH, batch, cos_sin_TR)

    def project(self, x_TH: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
        """`[T, C]`."""
        out_TC = torch.empty(len(x_TH), matrix.num_columns)
        self.team.run(layer_cpu.project, x_TH.numpy(), matrix.panels.numpy(), out_TC.numpy())
        return out_TC


class _LayerArrays:
    """One layer's weights and cache as the kernels take them."""

    def __init__(self, weights: LayerWeights, caches: tuple[torch.Tensor, torch.Tensor]) -> None:
        optional = (weights.qkv_bias, weights.q_norm, weights.k_norm)
        bias, q_norm, k_norm = (_NOTHING if part is None else part.numpy() for part in optional)
        self.norms_and_projections = (
            weights.input_norm.numpy(),
            _panels(weights.qkv),
            bias,
            q_norm,
            k_norm,
            _panels(weights.o),
            weights.post_attention_norm.numpy(),
        )
        self.caches = tuple(cache.numpy() for cache in caches)
        self.mlp = _panels(weights.mlp.gate_up), _panels(weights.mlp.down)


class DecodePass:
    """Some layers over one batch, all of whose tokens attend one by one."""

    def __init__(
        self, layers: DecodeLayers, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """
        Args:
            x_TH: changed in place by every layer.
        """
        assert batch.decode is not None, "every token attends on its own"
        self._layers, self._x = layers, x_TH.numpy()
        config, num_tokens = layers.config, len(x_TH)
        num_q, num_kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self._rotary = tuple(part.numpy() for part in cos_sin_TR)
        self._slots = batch.kv_slots_T.numpy()
        self._spans = batch.decode.pages_BP.numpy(), batch.decode.lengths_B.numpy(), layers.cache.page_size
        self.h_TH = torch.empty_like(x_TH)
        """The normalised input of the layer's feed-forward or experts."""
        self._h = self.h_TH.numpy()
        self._room = (
            np.empty((num_tokens, num_q + 2 * num_kv, dim), np.float32),
            np.empty((2, num_tokens, num_q * dim), np.float32),
            np.empty_like(self._h),
        )
        self._shared = np.empty_like(self._h)

    def attend(self, index: int, weights: LayerWeights) -> None:
        """The residual stream up to the layer's second half, and `h_TH`."""
        layers = self._layers
        layer = layers.layer(index, weights)
        layers.team.run(
            layer_cpu.attend,
            self._x,
            layers.eps,
            *layer.norms_and_projections,
            *self._rotary,
            self._slots,
            *layer.caches,
            *self._spans,
            layers.scale,
            self._h,
            *self._room,
        )

    def attended_s(self) -> list[tuple[str, float]]:
        """The stages of the last `attend`, and how long each took."""
        stages = layer_cpu.ATTEND_STAGES
        return list(zip(stages, self._layers.team.stage_s(len(stages)), strict=True))

    def feed_forward(self, index: int, weights: LayerWeights) -> None:
        """A dense layer's second half."""
        gate_up, down = self._layers.layer(index, weights).mlp
        room = (np.empty((len(self._x), size), np.float32) for size in (len(gate_up) * PANEL, down.shape[1]))
        self._layers.team.run(layer_cpu.feed_forward, self._x, self._h, gate_up, down, *room, self._room[2])

    def share(self, index: int, weights: LayerWeights) -> None:
        """The shared expert, by this thread alone: the experts are at work meanwhile."""
        swiglu(self._h, *self._layers.layer(index, weights).mlp, self._shared)

    def add_experts(self, routed_TH: torch.Tensor) -> None:
        layer_cpu.add_experts(self._x, routed_TH.numpy(), self._shared)


def _panels(matrix: Matrix) -> _Array:
    assert isinstance(matrix, PackedMatrix), "an fp32 CPU packs its matrices"
    panels: _Array = matrix.panels.numpy()
    return panels
