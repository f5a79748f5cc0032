"""What tests of the decode engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from experts.shard import ExpertShard
from model.checkpoint import Checkpoint
from model.weights import load_attention_weights
from ops.local import load_slots
from router.exchange import LocalExchange
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts
from tests.unit.decode.pair import (
    CPU,
    Model,
    Pair,
)


@pytest.fixture(scope="module")
def model() -> Model:
    checkpoint = Checkpoint.open(EMBEDDED_MODEL)
    config = checkpoint.config
    weights = load_attention_weights(checkpoint, torch.float32, CPU)
    placement = place_evenly(config.moe_layers, config.n_routed_experts, 1)
    shard = ExpertShard(load_slots(checkpoint, placement, 0, torch.float32, CPU))
    gates = {index: layer.gate for index, layer in enumerate(weights.layers) if layer.gate is not None}
    routed = RoutedExperts(config, gates)
    routed.adopt(Planner(placement, CPU), LocalExchange([shard.serve]))
    return Model(checkpoint, weights, routed)


@pytest.fixture
def pairs(model: Model) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**arguments: int) -> Pair:
        made.append(Pair(model, **arguments))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(pairs: Callable[..., Pair]) -> Pair:
    return pairs()
