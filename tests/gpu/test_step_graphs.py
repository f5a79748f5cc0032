"""Captured steps give the tokens of those that are not captured, whatever comes between two steps."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from cluster.planning import EMBEDDED_MODEL
from experts.shard import ExpertShard
from octet.config import DecodeConfig, SpeculationConfig
from octet.messages import PrefillRequest
from octet.request import Sampling
from ops.local import LocalEngine, load_slots, make_request
from router.exchange import LocalExchange
from router.placement import from_physical
from router.plan import Planner

DEVICE = torch.device("cuda")


def requests(count: int, sampling: Sampling | None = None) -> list[PrefillRequest]:
    """Some end early, so that the batch shrinks from step to step."""
    return [
        make_request(
            [random.randrange(1000) for _ in range(random.choice((1, 15, 16, 17, 200)))],
            max_new_tokens=random.randint(2, 40),
            sampling=sampling,
        )
        for _ in range(count)
    ]


def engine(cuda_graphs: bool, drafts: int = 0, dtype: torch.dtype = torch.float32) -> LocalEngine:
    return LocalEngine(
        EMBEDDED_MODEL,
        num_shards=3,
        dtype=dtype,
        device=DEVICE,
        decode=DecodeConfig(cuda_graphs=cuda_graphs, max_batch=24),
        speculation=SpeculationConfig(num_speculative_tokens=drafts, adaptive=False),
    )


@pytest.fixture
def both() -> Iterator[tuple[LocalEngine, LocalEngine]]:
    engines = engine(False), engine(True)
    yield engines
    for each in engines:
        each.close()


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_the_same_with_graphs_and_without(drafts: int, dtype: torch.dtype) -> None:
    asked = requests(30)
    answers = []
    for cuda_graphs in (False, True):
        one = engine(cuda_graphs, drafts, dtype)
        answers.append(one.generate(asked))
        one.close()
    if dtype == torch.float32:
        assert answers[0] == answers[1]
    else:
        # In bf16 a batch that was filled up may be multiplied by another kernel, and near ties fall otherwise.
        same = sum(ours == theirs for ours, theirs in zip(*answers, strict=True))
        assert same >= 20, f"{same} of 30 answers are the same"


def test_graphs_serve_sampled_requests(both: tuple[LocalEngine, LocalEngine]) -> None:
    asked = requests(12, Sampling(temperature=0.8, top_k=20, seed=7))
    assert both[0].generate(asked) == both[1].generate(asked)


def test_a_new_placement_is_routed_by_at_once(both: tuple[LocalEngine, LocalEngine]) -> None:
    """With as many slots a captured step finds them where it found the old ones; with more it is captured anew."""
    asked = requests(8)
    expected = both[0].generate(asked)
    graphs = both[1]
    assert graphs.generate(asked) == expected
    config = graphs.config
    layers, num_experts = config.expert_layers(0), config.n_routed_experts
    for num_slots in (33, 48):
        generation = graphs._routed.generation
        rows = [
            np.random.permutation(np.pad(np.arange(num_experts), (0, num_slots - num_experts), constant_values=0))
            for _ in layers
        ]
        placement = from_physical(np.array(rows, np.int32), layers, num_experts, 3, 2)
        slots = [load_slots(graphs.checkpoint, placement, shard, torch.float32, DEVICE) for shard in range(3)]
        exchange = LocalExchange([ExpertShard(each).serve for each in slots])
        graphs._routed.adopt(Planner(placement, DEVICE), exchange)
        assert (graphs._routed.generation == generation) == (num_slots == 33)
        assert graphs.generate(asked) == expected


def test_an_expert_that_is_not_there_fails_the_step(both: tuple[LocalEngine, LocalEngine]) -> None:
    for one in both:
        one.generate(requests(2))
        for shard in one.shards:
            shard.release(1, 0)
        with pytest.raises(RuntimeError, match="expert that it does not hold"):
            one.generate([make_request([random.randrange(1000) for _ in range(300)], max_new_tokens=4)])
