"""The prefix cache as a client sees it."""

from __future__ import annotations

import random

from octet.client import Client
from octet.v1 import octet_pb2 as pb
from tests.clusters import Start, at_baseline, wait_until


def _settled(client: Client) -> pb.GetStatusResponse:
    wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
    return client.status()


def _prefill_members(status: pb.GetStatusResponse) -> list[pb.Member]:
    return list(next(pool for pool in status.pools if pool.name == "prefill").members)


def test_a_shared_prefix_is_computed_once_and_changes_no_token(start: Start) -> None:
    prefix = random.choices(range(1000), k=100)
    prompts = [prefix + random.choices(range(1000), k=random.randrange(1, 40)) for _ in range(6)]
    answers, cached = [], []
    for switch in ("true", "false"):
        cluster = start(f"prefill.prefix_cache={switch}", "pools.prefill.size=2", "pools.experts.size=1")
        with Client(cluster.address, timeout_s=60) as client:
            responses = [client.generate(prompt, max_new_tokens=12, ignore_eos=True) for prompt in prompts]
            answers.append([list(response.choices[0].token_ids) for response in responses])
            cached.append([response.usage.cached_tokens for response in responses])
            status = _settled(client)
        members = _prefill_members(status)
        assert sum(member.cached_tokens for member in members) == sum(cached[-1])
        cluster.stop()
    assert answers[0] == answers[1]
    # 100 tokens are six full pages of 16; the scheduler keeps to the worker that has them.
    assert cached == [[0, *[96] * 5], [0] * 6]
