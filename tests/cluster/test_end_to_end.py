"""Whatever the pools' sizes, the tokens are the reference's."""

from __future__ import annotations

import asyncio
import pathlib
import random
from typing import Any

import pytest

from cluster.launch import RunningCluster
from octet.client import AsyncClient, Client
from octet.messages import PrefillRequest, pack_ids
from octet.request import Output, Sampling, Stopping
from octet.v1 import octet_pb2 as pb
from ops.local import CALLER, DECODE, LocalEngine
from tests.clusters import Reference, Start, at_baseline, wait_until

_NEW_TOKENS = 24


def _prompts(count: int) -> list[list[int]]:
    lengths = [1, 2, 15, 16, 17, 63, 64, 65, 200, 300]
    return [[random.randrange(3, 512) for _ in range(random.choice(lengths))] for _ in range(count)]


async def _generate_all(address: str, prompts: list[list[int]], options: list[dict[str, Any]]) -> list[list[int]]:
    async with AsyncClient(address, timeout_s=120) as client:
        calls = [client.generate(prompt, **o) for prompt, o in zip(prompts, options, strict=True)]
        responses = await asyncio.gather(*calls)
    return [list(response.choices[0].token_ids) for response in responses]


def _sampled_locally(checkpoint: pathlib.Path, prompt: list[int], seed: int) -> list[int]:
    engine = LocalEngine(checkpoint, num_pages=64)
    request = PrefillRequest(
        request_id=f"seed-{seed}",  # type: ignore[arg-type]
        attempt=0,
        choices=(0,),
        token_ids=pack_ids(prompt),
        num_prompt_tokens=len(prompt),
        sampling=Sampling(temperature=0.9, top_p=0.9, top_k=50, seed=seed),
        stopping=Stopping(max_new_tokens=_NEW_TOKENS),
        output=Output(),
        priority=0,
        arrival_s=0.0,
        decode_worker=DECODE,
        frontend=CALLER,
    )
    tokens = engine.generate([request])[0][0]
    engine.close()
    return tokens


@pytest.fixture(scope="module")
def wide(start: Start, checkpoint: pathlib.Path) -> RunningCluster:
    """The random checkpoint on two prefill workers, two decode workers and three shards."""
    sizes = ("pools.prefill.size=2", "pools.decode.size=2", "pools.experts.size=3")
    return start(f"model.path={checkpoint}", *sizes, "prefill.chunk_tokens=96")


@pytest.mark.parametrize("pools", ["small", "wide"])
async def test_sixteen_concurrent_requests_get_the_reference_tokens(
    pools: str, request: pytest.FixtureRequest, ray_session: None, checkpoint: pathlib.Path, reference: Reference
) -> None:
    cluster: RunningCluster = await asyncio.to_thread(request.getfixturevalue, pools)
    with Client(cluster.address, timeout_s=30) as client:
        before = _counted(client.status())
    prompts = _prompts(16)
    seeds = {index: random.getrandbits(32) for index in range(12, 16)}
    options: list[dict[str, Any]] = [
        {"max_new_tokens": _NEW_TOKENS, "ignore_eos": True}
        | ({"temperature": 0.9, "top_p": 0.9, "top_k": 50, "seed": seeds[i]} if i in seeds else {"temperature": 0.0})
        for i in range(16)
    ]

    answers = await _generate_all(cluster.address, prompts, options)

    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if index in seeds:
            assert answer == _sampled_locally(checkpoint, prompt, seeds[index])
        else:
            assert len(answer) == _NEW_TOKENS
            reference.check(prompt, answer)
    with Client(cluster.address, timeout_s=30) as client:
        wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
        status = client.status()
    # Each computed token has gone to exactly eight experts in every layer.
    computed = sum(map(len, prompts)) + 16 * (_NEW_TOKENS - 1)
    assert {layer: count - before[layer] for layer, count in _counted(status).items()} == dict.fromkeys(
        (1, 2), 8 * computed
    )


def _counted(status: pb.GetStatusResponse) -> dict[int, int]:
    """Tokens, once for each of their experts, by layer."""
    return {counts.layer: sum(counts.tokens) for counts in status.expert_counts}
