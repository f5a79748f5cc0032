"""The engines with their experts in processes of their own, over NCCL, with captured steps and without."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from experts.shard import ExpertShard
from model.checkpoint import Checkpoint
from octet.config import DecodeConfig
from ops.local import LocalEngine, load_slots, make_request
from router.exchange import ExpertRows
from router.frames import FrameLayout
from router.placement import place_evenly
from router.plan import Planner
from tests.gpu.nccl_ranks import serve_over_nccl

DEVICE = torch.device("cuda")
NUM_SHARDS = 2


@functools.cache
def _shard(index: int, dtype: torch.dtype) -> ExpertShard:
    checkpoint = Checkpoint.open(EMBEDDED_MODEL)
    config = checkpoint.config
    placement = place_evenly(config.expert_layers(0), config.n_routed_experts, NUM_SHARDS)
    return ExpertShard(load_slots(checkpoint, placement, index, dtype, DEVICE))


@dataclasses.dataclass(frozen=True)
class RealShard:
    """Half of the embedded model's experts, loaded in the process that serves them."""

    index: int
    dtype: torch.dtype

    def __call__(self, layer: int, rows: ExpertRows) -> torch.Tensor:
        return _shard(self.index, self.dtype).serve(layer, rows)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_tokens_are_those_of_one_process(cuda_graphs: bool) -> None:
    engine = LocalEngine(
        EMBEDDED_MODEL, num_shards=NUM_SHARDS, device=DEVICE, decode=DecodeConfig(cuda_graphs=cuda_graphs)
    )
    requests = [
        make_request([random.randrange(1000) for _ in range(length)], max_new_tokens=8) for length in (1, 16, 600, 40)
    ]
    expected = engine.generate(requests)
    config = engine.config
    layout = FrameLayout(
        hidden_size=config.hidden_size,
        experts_per_token=config.num_experts_per_tok,
        max_rows=1024,
        dtype=torch.float32,
    )
    placement = place_evenly(config.expert_layers(0), config.n_routed_experts, NUM_SHARDS)
    with serve_over_nccl([RealShard(index, torch.float32) for index in range(NUM_SHARDS)], layout, DEVICE) as exchange:
        engine._routed.adopt(Planner(placement, DEVICE), exchange)
        assert engine.generate(requests) == expected
    engine.close()
