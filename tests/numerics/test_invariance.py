"""The same tokens, however the work is cut: by shards, chunks, pages, batches, preemptions and replicas.

What is expected is each request's answer when it is computed alone by an engine with one shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from experts.shard import ExpertShard
from model import threads
from model.batch import Span
from model.checkpoint import Checkpoint
from model.kv_cache import KvCache
from model.pages import PagePool
from model.runner import ModelRunner
from model.transformer import Transformer
from model.weights import load_attention_weights
from octet.config import DecodeConfig, PrefillConfig
from ops.local import DECODE, LocalEngine, load_slots
from router.exchange import LocalExchange
from router.placement import EMPTY, Placement, from_physical
from router.plan import Planner
from router.routed_experts import RoutedExperts
from tests.numerics.conftest import MakeReference
from tests.numerics.tasks import NUM_NEW_TOKENS, VOCAB_SIZE, Task, answers, draw_task
from tests.reference import Reference

NUM_EXPERTS = 32


@pytest.fixture(scope="module")
def reference(make_reference: MakeReference) -> Reference:
    return make_reference("invariance", n_routed_experts=NUM_EXPERTS, num_hidden_layers=3, vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def tasks(reference: Reference) -> list[Task]:
    """Greedy ones, sampled ones, and one with three choices."""
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        greedy = [draw_task(reference, engine, length, sampled=False) for length in (1, 17, 64, 100)]
        sampled = [draw_task(reference, engine, length, sampled=True) for length in (5, 16, 33, 70)]
        return [*greedy, *sampled, draw_task(reference, engine, 26, sampled=True, choices=(0, 1, 2))]


ENGINES: dict[str, dict[str, Any]] = {
    "two_shards": {"num_shards": 2},
    "three_uneven_shards": {"num_shards": 3},
    "chunks_of_7": {"prefill": PrefillConfig(chunk_tokens=7)},
    "chunks_of_64": {"prefill": PrefillConfig(chunk_tokens=64)},
    "ping_pong_always": {"ping_pong_rows": 2},
    "ping_pong_of_large_steps": {"ping_pong_rows": 40},
    "chunks_of_512": {"prefill": PrefillConfig(chunk_tokens=512)},
    "one_prefill_at_a_time": {"prefill": PrefillConfig(max_requests=1)},
    "pages_of_4": {"page_size": 4},
    "pages_of_16": {"page_size": 16},
    "batches_of_3": {"decode": DecodeConfig(max_batch=3)},
    "batches_of_64": {"decode": DecodeConfig(max_batch=64)},
}


@pytest.mark.parametrize("name", ENGINES)
def test_tokens_do_not_depend_on_how_the_engine_cuts_the_work(
    name: str, reference: Reference, tasks: Sequence[Task]
) -> None:
    with contextlib.closing(LocalEngine(reference.model_dir, **ENGINES[name])) as engine:
        assert answers(engine, tasks) == [task.answer for task in tasks]


def test_tokens_do_not_depend_on_the_threads(
    reference: Reference, tasks: Sequence[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_own", 3)
    monkeypatch.setattr(threads, "_PART_OPERATIONS", 1)
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        assert answers(engine, tasks) == [task.answer for task in tasks]


def test_tokens_are_the_same_when_only_one_sequence_decodes_at_a_time(
    reference: Reference, tasks: Sequence[Task]
) -> None:
    single = [task for task in tasks if len(task.choices) == 1]
    with contextlib.closing(LocalEngine(reference.model_dir, decode=DecodeConfig(max_batch=1))) as engine:
        assert answers(engine, single) == [task.answer for task in single]


def test_tokens_do_not_depend_on_which_other_requests_there_are(reference: Reference, tasks: Sequence[Task]) -> None:
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        for _ in range(3):
            some = random.sample(tasks, random.randint(2, len(tasks)))
            assert answers(engine, some) == [task.answer for task in some]


def test_evicted_sequences_are_recomputed_to_the_same_tokens(reference: Reference, tasks: Sequence[Task]) -> None:
    """Whether somebody has to give way depends on how long the answers are: with ever fewer pages somebody does."""
    longest = max(len(task.prompt) + max(map(len, task.answer)) for task in tasks)
    for decode_pages in range(48, longest // 4 + 1, -2):
        with contextlib.closing(LocalEngine(reference.model_dir, page_size=4, decode_pages=decode_pages)) as engine:
            assert answers(engine, tasks) == [task.answer for task in tasks]
            if engine.load()[DECODE].preemptions > 0:
                return
    pytest.fail("there were pages for all")


def test_the_evictions_of_a_run_leave_no_page_behind(reference: Reference, tasks: Sequence[Task]) -> None:
    with contextlib.closing(LocalEngine(reference.model_dir, page_size=4, decode_pages=48)) as engine:
        answers(engine, tasks)
        load = engine.load()[DECODE]
        assert load.kv_pages_free == load.kv_pages_total


def test_a_choice_is_the_same_with_and_without_its_siblings(reference: Reference, tasks: Sequence[Task]) -> None:
    siblings = tasks[-1]
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        alone = [
            answers(engine, [dataclasses.replace(siblings, choices=(choice,))])[0][0] for choice in siblings.choices
        ]
    assert alone == siblings.answer


def test_choices_of_one_request_differ(tasks: Sequence[Task]) -> None:
    first, second, third = tasks[-1].answer
    assert first != second != third != first


def test_another_seed_gives_other_tokens(reference: Reference, tasks: Sequence[Task]) -> None:
    siblings = tasks[-1]
    sampling = dataclasses.replace(siblings.sampling, seed=siblings.sampling.seed ^ 1)
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        (other,) = answers(engine, [dataclasses.replace(siblings, sampling=sampling)])
    assert all(answer not in siblings.answer for answer in other)


def test_replicas_of_experts_give_the_same_tokens(reference: Reference, tasks: Sequence[Task]) -> None:
    """Fed with the greedy answers, every position must ask for the token that follows."""
    checkpoint = Checkpoint.open(reference.model_dir)
    placement = random_placement(checkpoint.config.moe_layers, num_shards=3, slots_per_shard=22)
    shards, runner = placed_runner(checkpoint, placement)
    greedy = [task for task in tasks if task.sampling.greedy]
    spans = [
        Span(
            token_ids=[*task.prompt, *task.answer[0][:-1]],
            start=0,
            pages=runner.pool.allocate(runner.pool.pages_for(len(task.prompt) + NUM_NEW_TOKENS)) or [],
        )
        for task in greedy
    ]
    hidden = runner.run(spans)
    found = [
        runner.logits(h_TH[len(task.prompt) - 1 :]).argmax(-1).tolist()
        for h_TH, task in zip(hidden, greedy, strict=True)
    ]
    assert found == [task.answer[0] for task in greedy]
    counts = [shard.counts() for shard in shards]
    serving = np.stack([[counted[layer] > 0 for counted in counts] for layer in placement.layers]).sum(1)
    assert serving.max() > 1, "no expert was served by two of its replicas"


def random_placement(layers: Sequence[int], num_shards: int, slots_per_shard: int) -> Placement:
    """Every expert once, then redundant ones, with two slots left empty, in another order for each layer."""
    num_redundant = num_shards * slots_per_shard - NUM_EXPERTS - 2
    rows = []
    for _ in layers:
        row = [*range(NUM_EXPERTS), *random.choices(range(NUM_EXPERTS), k=num_redundant), EMPTY, EMPTY]
        rows.append(random.sample(row, len(row)))
    return from_physical(np.array(rows, dtype=np.int32), layers, NUM_EXPERTS, num_shards, version=1)


def placed_runner(checkpoint: Checkpoint, placement: Placement) -> tuple[list[ExpertShard], ModelRunner]:
    config, cpu, dtype = checkpoint.config, torch.device("cpu"), torch.float32
    weights = load_attention_weights(checkpoint, dtype, cpu)
    shards = [
        ExpertShard(load_slots(checkpoint, placement, shard, dtype, cpu)) for shard in range(placement.num_shards)
    ]
    gates = {index: layer.gate for index, layer in enumerate(weights.layers) if layer.gate is not None}
    routed = RoutedExperts(config, gates)
    routed.adopt(Planner(placement, cpu), LocalExchange([shard.serve for shard in shards]))
    cache = KvCache(config, 64, 16, dtype, cpu)
    return shards, ModelRunner(Transformer(config, weights, cache, 512), routed, PagePool(64, 16), cache, cpu)
