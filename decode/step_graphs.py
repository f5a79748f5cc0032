"""Which decode steps are captured."""

from __future__ import annotations

from model.kv_cache import KvCache
from model.pages import PagePool
from model.step_graphs import StepGraphs
from model.transformer import Transformer
from octet.config import DecodeConfig, SpeculationConfig
from router.plan import DENSE_ROWS
from router.routed_experts import RoutedExperts


def step_graphs(
    transformer: Transformer,
    routed: RoutedExperts,
    pool: PagePool,
    cache: KvCache,
    config: DecodeConfig,
    speculation: SpeculationConfig,
    max_model_len: int,
) -> StepGraphs | None:
    """For a decode worker's steps with all of its drafts; None where there is no GPU, or none are wanted."""
    if cache.device.type != "cuda" or not config.cuda_graphs:
        return None
    most_rows = config.max_batch * (1 + speculation.num_speculative_tokens)
    return StepGraphs(transformer, routed, pool, cache, min(most_rows, DENSE_ROWS), max_model_len)
