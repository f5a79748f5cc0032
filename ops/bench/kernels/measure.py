"""Times the kernels of a layer.

Every call takes the next of several layers, so that weights and keys come from memory, as in a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from model.attention import Attention
from model.batch import DecodeSpans
from model.kv_cache import KvCache
from model.rotary import RotaryEmbedding
from model.weights import GateWeights
from ops.bench.kernels.device import DeviceRates, seconds_per_call
from ops.bench.kernels.layer import KERNELS, LayerShape, random_experts, random_tokens
from router.exchange import ExpertRows, LocalExchange
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

PAGE_SIZE = 16


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel at one size."""

    name: str
    size: str
    seconds: float
    """Per layer."""
    bandwidth_share: float | None = None
    """Bytes that must be read ÷ seconds ÷ the device's rate; None where that says nothing."""
    matmul_share: float | None = None


def expert_kernels(
    shape: LayerShape,
    rates: DeviceRates,
    token_counts: Sequence[int],
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Kernel]:
    layers = [random_experts(shape, dtype, device) for _ in range(num_layers)]
    for num_tokens in token_counts:
        tokens = random_tokens(shape, num_tokens, dtype, device)
        num_bytes = tokens.num_experts_hit * shape.expert_bytes(dtype)
        num_flops = 2 * tokens.num_pairs * shape.expert_numbers
        for name, kernel in KERNELS.items():
            seconds = seconds_per_call(lambda index, run=kernel, x=tokens: run(x, layers[index]), num_layers, device)  # type: ignore[misc]
            yield Kernel(
                name=f"experts, {name}",
                size=f"{num_tokens} tokens",
                seconds=seconds,
                bandwidth_share=num_bytes / seconds / rates.bytes_per_s,
                matmul_share=num_flops / seconds / rates.flops_per_s,
            )


def attention_kernel(
    shape: LayerShape,
    rates: DeviceRates,
    num_sequences: int,
    context: int,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Kernel:
    """One query per sequence over its pages, as a decode worker attends."""
    config = shape.config(num_layers)
    pages_each = -(-context // PAGE_SIZE)
    cache = KvCache(config, num_sequences * pages_each, PAGE_SIZE, dtype, device)
    attention = Attention(config, cache, RotaryEmbedding(config, context, device))
    spans = DecodeSpans(
        # Pages of a sequence lie anywhere.
        pages_BP=torch.randperm(num_sequences * pages_each, device=device).view(num_sequences, -1),
        lengths_B=torch.full((num_sequences,), context, device=device),
    )
    q_BQD = torch.randn(num_sequences, shape.query_heads, shape.head_dim, dtype=dtype, device=device)
    seconds = seconds_per_call(lambda index: attention._decode(index, q_BQD, spans), num_layers, device)
    num_bytes = num_sequences * context * 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
    return Kernel(
        name="attention, decode",
        size=f"{num_sequences} × {context}",
        seconds=seconds,
        bandwidth_share=num_bytes / seconds / rates.bytes_per_s,
    )


def routing_kernels(
    shape: LayerShape, token_counts: Sequence[int], num_shards: int, dtype: torch.dtype, device: torch.device
) -> Iterator[Kernel]:
    """Gate, plan, dispatch and combine of one layer, on shards of the same process that answer at once."""
    gate = GateWeights(
        weight=torch.randn(shape.experts, shape.hidden, device=device) * shape.hidden**-0.5,
        correction_bias=torch.zeros(shape.experts, device=device),
    )

    def echo(layer: int, rows: ExpertRows) -> torch.Tensor:
        return rows.x_UH

    placement = place_evenly([0], shape.experts, num_shards)
    routed = RoutedExperts(shape.config(1), {0: gate})
    routed.adopt(Planner(placement, device), LocalExchange([echo] * num_shards))
    for num_tokens in token_counts:
        x_TH = random_tokens(shape, num_tokens, dtype, device).x_TH
        seconds = seconds_per_call(lambda _, x=x_TH: routed.combine(routed.dispatch(0, x)), 20, device)  # type: ignore[misc]
        yield Kernel(name=f"dispatch + combine, {num_shards} shards", size=f"{num_tokens} tokens", seconds=seconds)
