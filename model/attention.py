"""Grouped-query attention over the paged cache.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `G = Q / N`, `D` head dim, `B` single-token sequences,
`S` cached positions.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
import torch.nn.functional as F

from model.batch import Batch, DecodeSpans, PrefillSpan
from model.blockwise import attend, merge
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.linear import linear
from model.norm import rms_norm
from model.rotary import RotaryEmbedding
from model.weights import LayerWeights

BLOCK_TOKENS = 1024
"""Keys and values that a prefill span attends to at once: they are gathered from their pages in pieces of this size, so
that a step takes the same memory at the end of a long prompt as at its beginning."""


class Attention:
    """One layer's attention, for every layer: writes keys and values, then attends. Where matrices are packed,
    `model.compiled_layers` is in its place."""

    def __init__(self, config: ModelConfig, cache: KvCache, rotary: RotaryEmbedding) -> None:
        self._config, self._cache, self._rotary = config, cache, rotary
        self._scale = config.head_dim**-0.5

    def __call__(
        self,
        index: int,
        layer: LayerWeights,
        x_TH: torch.Tensor,
        batch: Batch,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """`[T, H]`."""
        q_TQD = self._prepare(index, layer, self._project(layer, x_TH), batch, cos_sin)
        if batch.decode is None:
            out_TQD = torch.empty_like(q_TQD)
        elif not batch.prefill:
            return linear(self._decode(index, q_TQD, batch.decode).flatten(1), layer.o)
        else:
            out_TQD = torch.empty_like(q_TQD)
            num_sequences = batch.decode.pages_BP.shape[0]
            out_TQD[:num_sequences] = self._decode(index, q_TQD[:num_sequences], batch.decode)
        for span in batch.prefill:
            self._prefill(index, q_TQD[span.rows], batch.kv_slots_T[span.rows], span, out_TQD[span.rows])
        return linear(out_TQD.flatten(1), layer.o)

    def of_some(
        self,
        index: int,
        layer: LayerWeights,
        x_TH: torch.Tensor,
        batch: Batch,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        rows_W: torch.Tensor,
        decode: DecodeSpans,
    ) -> torch.Tensor:
        """`[W, H]`, of some rows, which attend on their own; keys and values are written of all."""
        q_TQD = self._prepare(index, layer, self._project(layer, x_TH), batch, cos_sin)
        return linear(self._decode(index, q_TQD[rows_W], decode).flatten(1), layer.o)

    def write(
        self,
        index: int,
        layer: LayerWeights,
        x_TH: torch.Tensor,
        batch: Batch,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Keys and values alone, for rows whose own output nobody wants."""
        self._prepare(index, layer, self._project(layer, x_TH), batch, cos_sin)

    def _project(self, layer: LayerWeights, x_TH: torch.Tensor) -> torch.Tensor:
        """`[T, Q + 2N, D]`."""
        config = self._config
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        return linear(x_TH, layer.qkv, layer.qkv_bias).view(-1, num_heads, config.head_dim)

    def _prepare(
        self,
        index: int,
        layer: LayerWeights,
        qkv_TXD: torch.Tensor,
        batch: Batch,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Normalise and rotate, write keys and values to the cache; the queries `[T, Q, D]`."""
        config = self._config
        num_q, num_kv, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
        q_TQD, k_TND, v_TND = torch.split(qkv_TXD, [num_q, num_kv, num_kv], dim=1)
        if norms is not None:
            q_TQD, k_TND = rms_norm(q_TQD, norms[0], eps), rms_norm(k_TND, norms[1], eps)
        q_TQD, k_TND = self._rotary.rotate(q_TQD, cos_sin), self._rotary.rotate(k_TND, cos_sin)
        self._cache.write(index, k_TND, v_TND, batch.kv_slots_T)
        return q_TQD

    def _decode(self, index: int, q_BQD: torch.Tensor, spans: DecodeSpans) -> torch.Tensor:
        """One query per sequence: the G query heads of a KV head are its rows, so keys are not repeated."""
        if q_BQD.device.type == "cuda":
            caches = self._cache.of_layer(index)
            return attention_gpu().decode_attention(  # type: ignore[no-any-return]
                q_BQD, *caches, spans.pages_BP, spans.lengths_B, self._cache.page_size, self._scale
            )
        k_BSND, v_BSND = self._cache.gather_pages(index, spans.pages_BP)
        out_BNGD = F.scaled_dot_product_attention(
            q_BQD.view(len(q_BQD), k_BSND.shape[2], -1, q_BQD.shape[2]),
            k_BSND.transpose(1, 2),
            v_BSND.transpose(1, 2),
            attn_mask=spans.mask_BL(self._cache.page_size)[:, None, None, :],
            scale=self._scale,
        )
        return out_BNGD.flatten(1, 2)

    def _prefill(
        self, index: int, q_TQD: torch.Tensor, kv_slots_T: torch.Tensor, span: PrefillSpan, out_TQD: torch.Tensor
    ) -> None:
        """Many queries of one sequence: causal among themselves, then block by block over what lies before them."""
        k_TND, v_TND = self._cache.gather(index, kv_slots_T)
        part = attend(q_TQD, k_TND, v_TND, causal=True, scale=self._scale)
        page_size = self._cache.page_size
        pages_per_block = max(1, BLOCK_TOKENS // page_size)
        for first in range(0, len(span.pages), pages_per_block):
            k_1SND, v_1SND = self._cache.gather_pages(index, span.pages[None, first : first + pages_per_block])
            num_tokens = min(span.start - first * page_size, k_1SND.shape[1])
            k_SND, v_SND = k_1SND[0, :num_tokens], v_1SND[0, :num_tokens]
            part = merge(part, attend(q_TQD, k_SND, v_SND, causal=False, scale=self._scale))
        out_TQD[:] = part.out_TQD


@functools.cache
def attention_gpu() -> ModuleType:
    # Imported here, so that CPU workers do without Triton.
    return importlib.import_module("model.attention_gpu")
