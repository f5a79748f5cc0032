"""The decoder stack of Glm4Moe without its routed experts.

Shapes: `T` tokens, `H` hidden, `Q` and `N` query and KV heads, `G = Q / N`, `D` head dim, `B` single-token sequences,
`S` cached positions, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F

from model.batch import Batch, DecodeSpans, PrefillSpan
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.rotary import RotaryEmbedding
from model.weights import AttentionWeights, LayerWeights, MlpWeights

_Pending = TypeVar("_Pending")


class RoutedLayer(Protocol[_Pending]):
    """The routed experts of every mixture-of-experts layer, wherever they are."""

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> _Pending:
        """Send the rows on their way and return at once."""

    def combine(self, pending: _Pending) -> torch.Tensor:
        """Wait for the experts' weighted sum `[T, H]`. Raises: LaneError."""


class Transformer:
    """Computes hidden states for a `Batch`, writing its keys and values into the cache."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights, cache: KvCache, max_model_len: int) -> None:
        self._config, self._weights, self._cache = config, weights, cache
        self._rotary = RotaryEmbedding(config, max_model_len, weights.embedding.device)
        self._attend = _Attention(config, cache, self._rotary)

    @torch.inference_mode()
    def forward(self, batch: Batch, routed: RoutedLayer[_Pending]) -> torch.Tensor:
        """The normalised hidden states `[T, H]`. Raises: LaneError; the step may then be run again."""
        steps = self.steps(batch, routed)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                hidden_TH: torch.Tensor = done.value
                return hidden_TH

    def steps(self, batch: Batch, routed: RoutedLayer[_Pending]) -> Generator[None, None, torch.Tensor]:
        """`forward`, yielding while each layer's rows are away, so that two batches can take turns."""
        x_TH = F.embedding(batch.token_ids_T, self._weights.embedding)
        cos_sin = self._rotary.at(batch.positions_T, x_TH.dtype)
        for index, layer in enumerate(self._weights.layers):
            h_TH = self._norm(x_TH, layer.input_norm)
            x_TH = x_TH + self._attend(index, layer, h_TH, batch, cos_sin)
            h_TH = self._norm(x_TH, layer.post_attention_norm)
            if layer.gate is None:
                x_TH = x_TH + _mlp(layer.mlp, h_TH)
            else:
                pending = routed.dispatch(index, h_TH)
                shared_TH = _mlp(layer.mlp, h_TH)
                yield
                x_TH = x_TH + (routed.combine(pending).to(x_TH.dtype) + shared_TH)
        return self._norm(x_TH, self._weights.norm)

    @torch.inference_mode()
    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """`[T, V]` in fp32."""
        return F.linear(hidden_TH, self._weights.lm_head).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return _rms_norm(x, weight, self._config.rms_norm_eps)


class _Attention:
    """Grouped-query attention over the paged cache."""

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
        config = self._config
        num_q, num_kv, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = F.linear(x_TH, layer.qkv, layer.qkv_bias).view(-1, num_q + 2 * num_kv, head_dim)
        q_TQD, k_TND, v_TND = qkv.split((num_q, num_kv, num_kv), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_TQD = _rms_norm(q_TQD, layer.q_norm, config.rms_norm_eps)
            k_TND = _rms_norm(k_TND, layer.k_norm, config.rms_norm_eps)
        q_TQD, k_TND = self._rotary.rotate(q_TQD, cos_sin), self._rotary.rotate(k_TND, cos_sin)
        self._cache.write(index, k_TND, v_TND, batch.kv_slots_T)
        out_TQD = torch.empty_like(q_TQD)
        if batch.decode is not None:
            num_sequences = batch.decode.pages_BP.shape[0]
            out_TQD[:num_sequences] = self._decode(index, q_TQD[:num_sequences], batch.decode)
        for span in batch.prefill:
            out_TQD[span.rows] = self._prefill(index, q_TQD[span.rows], span)
        return F.linear(out_TQD.flatten(1), layer.o)

    def _decode(self, index: int, q_BQD: torch.Tensor, spans: DecodeSpans) -> torch.Tensor:
        """One query per sequence: the G query heads of a KV head are its rows, so keys are not repeated."""
        k_BSND, v_BSND = self._cache.gather_pages(index, spans.pages_BP)
        out_BNGD = F.scaled_dot_product_attention(
            q_BQD.view(len(q_BQD), k_BSND.shape[2], -1, q_BQD.shape[2]),
            k_BSND.transpose(1, 2),
            v_BSND.transpose(1, 2),
            attn_mask=spans.mask_BL[:, None, None, :],
            scale=self._scale,
        )
        return out_BNGD.flatten(1, 2)

    def _prefill(self, index: int, q_TQD: torch.Tensor, span: PrefillSpan) -> torch.Tensor:
        """Many queries of one sequence: KV heads are the batch, their keys broadcast over the G query heads."""
        k_SND, v_SND = self._cache.gather(index, span.kv_slots)
        group = q_TQD.shape[1] // k_SND.shape[1]
        out_NGTD = F.scaled_dot_product_attention(
            q_TQD.view(len(q_TQD), -1, group, q_TQD.shape[2]).permute(1, 2, 0, 3),
            k_SND.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1),
            v_SND.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1),
            attn_mask=span.mask,
            is_causal=span.mask is None,
            scale=self._scale,
        )
        return out_NGTD.permute(2, 0, 1, 3).flatten(1, 2)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised over the last dim in fp32, then scaled in the weights' own precision (as the reference does)."""
    x_fp32 = x.float()
    normalised = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normalised.to(x.dtype)


def _mlp(weights: MlpWeights, x_TH: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x_TH, weights.gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, weights.down)
