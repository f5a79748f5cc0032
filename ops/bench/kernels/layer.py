"""One mixture-of-experts layer of a given shape with random weights, and the kernels that run over it.

Shapes: `T` tokens, `H` hidden, `E` experts, `I` intermediate, `K` experts per token, `N` (token, expert) pairs.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from cluster.planning import EMBEDDED_MODEL
from experts.grouped import count_slots, grouped_gpu, grouped_swiglu
from model.config import ModelConfig, read_config


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    hidden: int
    experts: int
    intermediate: int
    experts_per_token: int
    query_heads: int
    kv_heads: int
    head_dim: int

    @property
    def expert_numbers(self) -> int:
        return 3 * self.hidden * self.intermediate

    def config(self, num_layers: int) -> ModelConfig:
        """A model of such layers, all of them with experts."""
        return dataclasses.replace(
            read_config(EMBEDDED_MODEL),
            hidden_size=self.hidden,
            n_routed_experts=self.experts,
            moe_intermediate_size=self.intermediate,
            num_experts_per_tok=self.experts_per_token,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_hidden_layers=num_layers,
            first_k_dense_replace=0,
        )

    def expert_bytes(self, dtype: torch.dtype) -> int:
        return self.expert_numbers * dtype.itemsize


GLM_4_6 = LayerShape(
    hidden=5120, experts=160, intermediate=1536, experts_per_token=8, query_heads=96, kv_heads=8, head_dim=128
)
TINY = LayerShape(hidden=64, experts=16, intermediate=32, experts_per_token=4, query_heads=8, kv_heads=2, head_dim=16)
"""For CPUs: it exercises the same code."""


@dataclasses.dataclass(frozen=True, slots=True)
class ExpertWeights:
    gate_up: torch.Tensor
    """`[E, 2I, H]`"""
    down: torch.Tensor
    """`[E, H, I]`"""


@dataclasses.dataclass(frozen=True, slots=True)
class RoutedTokens:
    """Tokens whose experts are drawn evenly, as for a balanced layer."""

    x_TH: torch.Tensor
    experts_TK: torch.Tensor
    """int32."""
    weights_TK: torch.Tensor

    @property
    def num_experts_hit(self) -> int:
        return len(self.experts_TK.unique())

    @property
    def num_pairs(self) -> int:
        return self.experts_TK.numel()


def random_experts(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> ExpertWeights:
    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(shape.experts, rows, columns, dtype=dtype, device=device).mul_(columns**-0.5)

    return ExpertWeights(draw(2 * shape.intermediate, shape.hidden), draw(shape.hidden, shape.intermediate))


def random_tokens(shape: LayerShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> RoutedTokens:
    scores_TE = torch.rand(num_tokens, shape.experts, device=device)
    return RoutedTokens(
        x_TH=torch.randn(num_tokens, shape.hidden, dtype=dtype, device=device),
        experts_TK=scores_TE.topk(shape.experts_per_token, dim=-1).indices.int(),
        weights_TK=torch.rand(num_tokens, shape.experts_per_token, device=device),
    )


def served(tokens: RoutedTokens, weights: ExpertWeights) -> torch.Tensor:
    """As a shard computes it, counting its slots on the way: `[T, H]`."""
    rows, num_experts = (tokens.x_TH, tokens.experts_TK, tokens.weights_TK), len(weights.gate_up)
    if tokens.x_TH.is_cuda:
        holds_E = torch.ones(num_experts, dtype=torch.uint8, device=tokens.x_TH.device)
        counters = grouped_gpu().slot_counters(num_experts, tokens.x_TH.device)
        y_TH: torch.Tensor = grouped_gpu().grouped_swiglu(*rows, weights.gate_up, weights.down, holds_E, counters)
        return y_TH
    return grouped_swiglu(*rows, weights.gate_up, weights.down, count_slots(tokens.experts_TK, num_experts))


def by_grouped_mm(tokens: RoutedTokens, weights: ExpertWeights) -> torch.Tensor:
    """The same by `torch.nn.functional.grouped_mm`, without a synchronisation with the host: `[T, H]` in fp32."""
    experts_N = tokens.experts_TK.flatten()
    order_N = experts_N.argsort()
    rows_N = order_N // tokens.experts_TK.shape[1]
    counts_E = torch.bincount(experts_N, minlength=len(weights.gate_up))
    offsets_E = counts_E.cumsum(0).int()
    h_N2I = F.grouped_mm(tokens.x_TH[rows_N], weights.gate_up.transpose(1, 2), offs=offsets_E)
    gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
    out_NH = F.grouped_mm(F.silu(gate_NI) * up_NI, weights.down.transpose(1, 2), offs=offsets_E)
    weighted_NH = out_NH.float() * tokens.weights_TK.flatten()[order_N].unsqueeze(1)
    y_TH = torch.zeros(tokens.x_TH.shape, dtype=torch.float32, device=tokens.x_TH.device)
    return y_TH.index_add_(0, rows_N, weighted_NH)


KERNELS = {"as served": served, "grouped_mm": by_grouped_mm}
