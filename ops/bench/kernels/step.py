"""A whole decode step of an attention worker, its kernels launched one by one and as captured graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch

from model.batch import Span
from model.kv_cache import KvCache
from model.linear import MlpWeights
from model.pages import PagePool
from model.runner import ModelRunner
from model.step_graphs import StepGraphs
from model.transformer import Transformer
from model.weights import AttentionWeights, GateWeights, LayerWeights, gates_of
from ops.bench.kernels.device import DeviceRates, seconds_per_call
from ops.bench.kernels.layer import LayerShape
from ops.bench.kernels.measure import PAGE_SIZE, Kernel
from router.exchange import ExpertRows, LocalExchange
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

_VOCABULARY = 1024
_STEPS = 10


def step_kernels(
    shape: LayerShape,
    rates: DeviceRates,
    num_sequences: int,
    context: int,
    num_layers: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Kernel]:
    """Per layer: attention, gate, plan, shared expert; the shard of the routed experts answers at once. On a GPU."""
    config = shape.config(num_layers)
    weights = _random_weights(shape, num_layers, dtype, device)
    pool = PagePool(num_sequences * -(-context // PAGE_SIZE), PAGE_SIZE)
    cache = KvCache(config, pool.num_pages, PAGE_SIZE, dtype, device)
    transformer = Transformer(config, weights, cache, context)
    routed = RoutedExperts(config, gates_of(weights))
    routed.adopt(Planner(place_evenly(config.moe_layers, shape.experts, 1), device), LocalExchange([_echo]))
    each = pool.num_pages // num_sequences
    tables = [pool.allocate(each) for _ in range(num_sequences)]
    spans = [
        Span(token_ids=[random.randrange(_VOCABULARY)], start=context - 1, pages=pages, by_token=True)
        for pages in tables
        if pages is not None
    ]
    captured = StepGraphs(transformer, routed, pool, cache, num_sequences, context)
    keys_and_values = num_sequences * context * 2 * shape.kv_heads * shape.head_dim * dtype.itemsize
    num_bytes = keys_and_values + _layer_bytes(weights.layers[0])
    for name, graphs in (("launched", None), ("captured", captured)):
        runner = ModelRunner(transformer, routed, pool, cache, device, graphs=graphs)
        seconds = seconds_per_call(lambda _, run=runner.run: run(spans), _STEPS, device) / num_layers  # type: ignore[misc]
        yield Kernel(
            name=f"step without experts, {name}",
            size=f"{num_sequences} × {context}",
            seconds=seconds,
            bandwidth_share=num_bytes / seconds / rates.bytes_per_s,
        )


def _echo(layer: int, rows: ExpertRows) -> torch.Tensor:
    return rows.x_UH


def _random_weights(shape: LayerShape, num_layers: int, dtype: torch.dtype, device: torch.device) -> AttentionWeights:
    def matrix(rows: int, columns: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=of, device=device).mul_(columns**-0.5)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=dtype, device=device)

    heads = shape.query_heads + 2 * shape.kv_heads
    layers = tuple(
        LayerWeights(
            input_norm=ones(shape.hidden),
            post_attention_norm=ones(shape.hidden),
            qkv=matrix(heads * shape.head_dim, shape.hidden),
            qkv_bias=torch.zeros(heads * shape.head_dim, dtype=dtype, device=device),
            q_norm=ones(shape.head_dim),
            k_norm=ones(shape.head_dim),
            o=matrix(shape.hidden, shape.query_heads * shape.head_dim),
            mlp=MlpWeights(
                gate_up=matrix(2 * shape.intermediate, shape.hidden), down=matrix(shape.hidden, shape.intermediate)
            ),
            gate=GateWeights(
                weight=matrix(shape.experts, shape.hidden, torch.float32),
                correction_bias=torch.zeros(shape.experts, device=device),
            ),
        )
        for _ in range(num_layers)
    )
    embedding = matrix(_VOCABULARY, shape.hidden)
    return AttentionWeights(embedding=embedding, layers=layers, norm=ones(shape.hidden), lm_head=embedding)


def _layer_bytes(layer: LayerWeights) -> int:
    matrices = [layer.qkv, layer.o, layer.mlp.gate_up, layer.mlp.down]
    if layer.gate is not None:
        matrices.append(layer.gate.weight)
    return sum(matrix.nbytes for matrix in matrices if isinstance(matrix, torch.Tensor))
