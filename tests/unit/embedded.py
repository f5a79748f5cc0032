"""The embedded model in this process, for tests of engines."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from cluster.planning import EMBEDDED_MODEL
from experts.shard import ExpertShard
from model.checkpoint import Checkpoint
from model.kv_cache import KvCache
from model.pages import PagePool
from model.runner import ModelRunner
from model.transformer import RoutedLayer, Transformer
from model.weights import AttentionWeights, load_attention_weights
from ops.local import load_slots
from router.exchange import LocalExchange
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

CPU = torch.device("cpu")
PAGE = 4
"""Tokens of a page."""


@dataclasses.dataclass(frozen=True)
class Model:
    checkpoint: Checkpoint
    weights: AttentionWeights
    routed: RoutedExperts
    """Whose experts are all in one shard."""

    @staticmethod
    def load() -> Model:
        checkpoint = Checkpoint.open(EMBEDDED_MODEL)
        config = checkpoint.config
        weights = load_attention_weights(checkpoint, torch.float32, CPU)
        placement = place_evenly(config.moe_layers, config.n_routed_experts, 1)
        shard = ExpertShard(load_slots(checkpoint, placement, 0, torch.float32, CPU))
        gates = {index: layer.gate for index, layer in enumerate(weights.layers) if layer.gate is not None}
        routed = RoutedExperts(config, gates)
        routed.adopt(Planner(placement, CPU), LocalExchange([shard.serve]))
        return Model(checkpoint, weights, routed)

    def runner(self, num_pages: int, context: int, routed: RoutedLayer[Any]) -> ModelRunner:
        """With pages of its own.

        Args:
            context: the longest sequence.
        """
        config = self.checkpoint.config
        cache = KvCache(config, num_pages, PAGE, torch.float32, CPU)
        transformer = Transformer(config, self.weights, cache, context)
        return ModelRunner(transformer, routed, PagePool(num_pages, PAGE), cache, CPU)
