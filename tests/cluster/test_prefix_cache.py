"""The prefix cache as a client sees it."""

from __future__ import annotations

import contextlib
import random

from cluster.launch import RunningCluster
from cluster.planning import EMBEDDED_MODEL
from octet.client import Client
from octet.v1 import octet_pb2 as pb
from ops.local import LocalEngine, make_request
from tests.clusters import at_baseline, wait_until


def _settled(client: Client) -> pb.GetStatusResponse:
    wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
    return client.status()


def _prefill_members(status: pb.GetStatusResponse) -> list[pb.Member]:
    return list(next(pool for pool in status.pools if pool.name == "prefill").members)


def _cached_by_members(status: pb.GetStatusResponse) -> int:
    return sum(member.cached_tokens for member in _prefill_members(status))


def test_a_shared_prefix_is_computed_once_and_changes_no_token(paired: RunningCluster) -> None:
    prefix = random.choices(range(1000), k=100)
    prompts = [prefix + random.choices(range(1000), k=random.randrange(1, 40)) for _ in range(6)]
    with Client(paired.address, timeout_s=60) as client:
        before = _cached_by_members(client.status())
        responses = [client.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]
        status = _settled(client)
    cached = [response.usage.cached_tokens for response in responses]
    # 100 tokens are six full pages of 16; the scheduler keeps to the worker that has them.
    assert cached == [0, *[96] * 5]
    assert _cached_by_members(status) - before == sum(cached)
    # Each alone, by an engine that caches nothing.
    for prompt, response in zip(prompts, responses, strict=True):
        with contextlib.closing(LocalEngine(EMBEDDED_MODEL, num_pages=64)) as engine:
            (alone,) = engine.generate([make_request(prompt, max_new_tokens=12)])
        assert list(response.choices[0].token_ids) == alone[0]
