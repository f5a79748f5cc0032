"""Speculation as a client sees it."""

from __future__ import annotations

import random

from cluster.launch import RunningCluster
from octet.client import Client
from tests.clusters import Start, at_baseline, wait_until


def test_drafts_change_no_token_and_are_counted(start: Start, embedded: RunningCluster) -> None:
    prompts = [random.choices(range(1000), k=random.randrange(1, 60)) for _ in range(6)]
    drafting = start("speculation.num_speculative_tokens=3", "speculation.adaptive=false", "pools.experts.size=1")
    answers, drafted = [], []
    for cluster in (embedded, drafting):
        with Client(cluster.address, timeout_s=60) as client:
            responses = [
                # Among few: with a thousand tokens a number drawn may fall on a boundary between two but for rounding.
                client.generate(prompt, max_new_tokens=24, n=2, seed=5, temperature=0.8, top_k=8, ignore_eos=True)
                for prompt in prompts
            ]
            answers.append([[list(choice.token_ids) for choice in response.choices] for response in responses])
            wait_until(lambda: at_baseline(client.status()), 10, "pages back to baseline")
            status = client.status()
        (decode,) = next(pool for pool in status.pools if pool.name == "decode").members
        drafted.append(decode.drafted_tokens)
        assert decode.accepted_tokens <= decode.drafted_tokens
    assert answers[0] == answers[1]
    assert drafted[0] == 0
    assert drafted[1] > 0
    drafting.stop()
