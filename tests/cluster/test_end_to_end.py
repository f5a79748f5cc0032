"""Whatever the pools' sizes, the tokens are the reference's."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import random
from typing import Any

import pytest

from cluster.launch import RunningCluster
from octet.client import AsyncClient, Client
from octet.v1 import octet_pb2 as pb
from ops.local import LocalEngine
from tests.clusters import Start, at_baseline, wait_until
from tests.numerics.tasks import NUM_NEW_TOKENS, Task, draw_task
from tests.reference import Reference

_LENGTHS = [1, 2, 15, 16, 17, 63, 64, 65, 200, 300]


@pytest.fixture(scope="module")
def tasks(reference: Reference) -> list[Task]:
    """Greedy and sampled ones, with the answers of an engine in one process."""
    with contextlib.closing(LocalEngine(reference.model_dir)) as engine:
        return [
            draw_task(reference, engine, random.choice(_LENGTHS), sampled=number >= 12, vocab_size=512)
            for number in range(16)
        ]


async def _generate_all(address: str, tasks: list[Task]) -> list[list[int]]:
    async with AsyncClient(address, timeout_s=120) as client:
        responses = await asyncio.gather(*(client.generate(task.prompt, **_options(task)) for task in tasks))
    return [list(response.choices[0].token_ids) for response in responses]


def _options(task: Task) -> dict[str, Any]:
    sampling = task.sampling
    drawn = {} if sampling.greedy else {"top_p": sampling.top_p, "seed": sampling.seed}
    return {"max_new_tokens": NUM_NEW_TOKENS, "ignore_eos": True, "temperature": sampling.temperature} | drawn


@pytest.fixture(scope="module")
def wide(start: Start, checkpoint: pathlib.Path) -> RunningCluster:
    """The random checkpoint on two prefill workers, two decode workers and three shards."""
    sizes = ("pools.prefill.size=2", "pools.decode.size=2", "pools.experts.size=3")
    return start(f"model.path={checkpoint}", *sizes, "prefill.chunk_tokens=96")


@pytest.mark.parametrize("pools", ["small", "wide"])
async def test_sixteen_concurrent_requests_get_the_reference_tokens(
    pools: str, request: pytest.FixtureRequest, ray_session: None, reference: Reference, tasks: list[Task]
) -> None:
    cluster: RunningCluster = await asyncio.to_thread(request.getfixturevalue, pools)
    with Client(cluster.address, timeout_s=30) as client:
        before = _counted(client.status())

    answers = await _generate_all(cluster.address, tasks)

    assert answers == [task.answer[0] for task in tasks]
    greedy = [task for task in tasks if task.sampling.greedy]
    assert [task.answer for task in greedy] == [reference.greedy([task.prompt], NUM_NEW_TOKENS) for task in greedy]
    with Client(cluster.address, timeout_s=30) as client:
        wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
        status = client.status()
    # Each computed token has gone to exactly eight experts in every layer; of a prompt, the last layer computes one.
    computed = sum(len(task.prompt) + NUM_NEW_TOKENS - 1 for task in tasks)
    assert {layer: count - before[layer] for layer, count in _counted(status).items()} == {
        1: 8 * computed,
        2: 8 * len(tasks) * NUM_NEW_TOKENS,
    }


def _counted(status: pb.GetStatusResponse) -> dict[int, int]:
    """Tokens, once for each of their experts, by layer."""
    return {counts.layer: sum(counts.tokens) for counts in status.expert_counts}
