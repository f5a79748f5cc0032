"""Decoder layers on an fp32 CPU: compiled calls with their arrays made ready.

Between calls there is Python of a few lines. `DecodePass` is for tokens that attend one by one (`model.layer_cpu`),
`PrefillPass` for batches with prompts (`model.chunk_cpu` and `model.prefill_cpu`), `WantedPass` for a layer of which
some rows are wanted only.

Shapes: `T` tokens, of which `W` are wanted, `H` hidden, `Q` and `N` query and KV heads, `D` head dim, `C` columns.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch

from model import chunk_cpu, layer_cpu
from model.batch import Batch
from model.config import ModelConfig
from model.fused_cpu import decode_attention
from model.kv_cache import KvCache
from model.linear import PANEL, Matrix, PackedMatrix, linear, swiglu
from model.linear_cpu import swiglu as swiglu_cpu
from model.prefill_cpu import PrefillAttention
from model.team_cpu import Team
from model.threads import in_parts, moving, num_threads
from model.tiles_cpu import MAX_ROWS
from model.weights import LayerWeights

_Array = npt.NDArray[np.float32]
_NOTHING: _Array = np.empty(0, np.float32)


class CompiledLayers:
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

    def begin(
        self, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]
    ) -> DecodePass | PrefillPass:
        """
        Args:
            x_TH: changed in place by every layer.
        """
        return (PrefillPass if batch.prefill else DecodePass)(self, x_TH, batch, cos_sin_TR)

    def wanted(self, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]) -> WantedPass:
        return WantedPass(self, x_TH, batch, cos_sin_TR)

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
        self.caches: tuple[_Array, _Array] = caches[0].numpy(), caches[1].numpy()
        self.kv, self.num_beside_kv = self._without_queries()
        """The panels of keys and values with their bias, and how many query heads are among them still."""
        self.mlp = _panels(weights.mlp.gate_up), _panels(weights.mlp.down)

    def _without_queries(self) -> tuple[tuple[_Array, _Array], int]:
        _, qkv, bias, *_, o, _ = self.norms_and_projections
        num_columns, dim = o.shape[1], self.caches[0].shape[2]
        if num_columns % PANEL:
            # Keys begin in the midst of a panel.
            return (qkv, bias), num_columns // dim
        return (qkv[num_columns // PANEL :], bias[num_columns:]), 0


class WantedPass:
    """One layer over a batch, of which some rows are wanted and of the others their keys and values alone."""

    def __init__(
        self, layers: CompiledLayers, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._layers, self._x_TH, self._batch = layers, x_TH, batch
        self._at = *cos_sin_TR, batch.kv_slots_T

    def write_kv(self, index: int, weights: LayerWeights) -> None:
        """Of all rows."""
        layers, x = self._layers, self._x_TH.numpy()
        layer = layers.layer(index, weights)
        norm, _, _, q_norm, k_norm, *_ = layer.norms_and_projections
        at = (part.numpy() for part in self._at)
        q = np.empty((len(x), layer.num_beside_kv, layers.config.head_dim), np.float32)
        project = functools.partial(chunk_cpu.project, x, layers.eps, norm, *layer.kv, q_norm, k_norm)
        _by_rows(functools.partial(project, *at, *layer.caches, q), len(x), layer.kv[0].size)

    def attend(self, index: int, weights: LayerWeights) -> torch.Tensor:
        """The residual stream `[W, H]` up to the layer's second half. The wanted rows, of which there are some, attend
        on their own."""
        self.write_kv(index, weights)
        layers, config, wanted = self._layers, self._layers.config, self._batch.wanted
        assert wanted is not None, "some rows are wanted"
        assert wanted.decode is not None, "some rows are wanted"
        layer, x_WH = layers.layer(index, weights), self._x_TH[wanted.rows_W]
        norm, *projection, _o, _output_norm = layer.norms_and_projections
        q_WQD = torch.empty(len(x_WH), config.num_attention_heads, config.head_dim)
        at = (part[wanted.rows_W].numpy() for part in self._at)
        # Writes their keys and values once more, as they are.
        rows = *at, *layer.caches, q_WQD.numpy(), 0, len(x_WH)
        chunk_cpu.project(x_WH.numpy(), layers.eps, norm, *projection, *rows)
        spans, caches = wanted.decode, layers.cache.of_layer(index)
        page_size, scale = layers.cache.page_size, float(layers.scale)
        out_WQD = decode_attention(q_WQD, *caches, spans.pages_BP, spans.lengths_B, page_size, scale)
        return x_WH + linear(out_WQD.flatten(1), weights.o)


class DecodePass:
    """Some layers over one batch, all of whose tokens attend one by one."""

    def __init__(
        self, layers: CompiledLayers, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
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
        swiglu_cpu(self._h, *self._layers.layer(index, weights).mlp, self._shared)

    def add_experts(self, routed_TH: torch.Tensor) -> None:
        layer_cpu.add_experts(self._x, routed_TH.numpy(), self._shared, 0, len(self._x))


class PrefillPass:
    """Some layers over one batch that has prompts, and perhaps tokens that attend one by one before them."""

    def __init__(
        self, layers: CompiledLayers, x_TH: torch.Tensor, batch: Batch, cos_sin_TR: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        self._layers, self._x, self._batch = layers, x_TH.numpy(), batch
        config = layers.config
        self._rotary = tuple(part.numpy() for part in cos_sin_TR)
        self._slots = batch.kv_slots_T.numpy()
        self.h_TH = torch.empty_like(x_TH)
        """The normalised input of the layer's feed-forward or experts."""
        self._h = self.h_TH.numpy()
        self._q_TQD = torch.empty(len(x_TH), config.num_attention_heads, config.head_dim)
        self._out_TQD = torch.empty_like(self._q_TQD)
        self._q, self._out, self._attended = (
            self._q_TQD.numpy(),
            self._out_TQD.numpy(),
            self._out_TQD.flatten(1).numpy(),
        )
        assert batch.prefill_table is not None, "a batch on a CPU has one"
        page_size, scale = layers.cache.page_size, float(layers.scale)
        self._attention = PrefillAttention(batch.prefill_table, batch.kv_slots_T, page_size, scale)
        self._shared_TH = self.h_TH

    def attend(self, index: int, weights: LayerWeights) -> None:
        """The residual stream up to the layer's second half, and `h_TH`."""
        layers = self._layers
        layer = layers.layer(index, weights)
        norm, qkv, bias, q_norm, k_norm, o, output_norm = layer.norms_and_projections
        project = functools.partial(chunk_cpu.project, self._x, layers.eps, norm, qkv, bias, q_norm, k_norm)
        rows = *self._rotary, self._slots, *layer.caches, self._q
        _by_rows(functools.partial(project, *rows), len(self._x), qkv.size)
        self._attend_to_pages(index, layer)
        close = functools.partial(chunk_cpu.close, self._attended, o, self._x, layers.eps, output_norm, self._h)
        _by_rows(close, len(self._x), o.size)

    def feed_forward(self, index: int, weights: LayerWeights) -> None:
        """A dense layer's second half."""
        self._x += swiglu(self.h_TH, weights.mlp).numpy()

    def share(self, index: int, weights: LayerWeights) -> None:
        """The shared expert, while the experts are at work."""
        self._shared_TH = swiglu(self.h_TH, weights.mlp)

    def add_experts(self, routed_TH: torch.Tensor) -> None:
        add = functools.partial(layer_cpu.add_experts, self._x, routed_TH.numpy(), self._shared_TH.numpy())
        in_parts(add, len(self._x), moving(self._x.nbytes))

    def _attend_to_pages(self, index: int, layer: _LayerArrays) -> None:
        if (spans := self._batch.decode) is not None:
            rows, cache = slice(len(spans.lengths_B)), self._layers.cache
            self._out_TQD[rows] = decode_attention(
                self._q_TQD[rows],
                *cache.of_layer(index),
                spans.pages_BP,
                spans.lengths_B,
                cache.page_size,
                float(self._layers.scale),
            )
        self._attention(self._q, *layer.caches, self._out)


def _by_rows(work: functools.partial[None], num_rows: int, num_weights: int) -> None:
    """Whole tiles of rows."""

    def compute(first: int, last: int) -> None:
        work(first * MAX_ROWS, min(last * MAX_ROWS, num_rows))

    in_parts(compute, -(-num_rows // MAX_ROWS), 2 * num_rows * num_weights)


def _panels(matrix: Matrix) -> _Array:
    assert isinstance(matrix, PackedMatrix), "an fp32 CPU packs its matrices"
    panels: _Array = matrix.panels.numpy()
    return panels
