"""The engine on a GPU gives the CPU's tokens."""

from __future__ import annotations

import random

import torch

from cluster.planning import EMBEDDED_MODEL
from octet.messages import PrefillRequest
from ops.local import LocalEngine, make_request


def _requests() -> list[PrefillRequest]:
    prompts = [[random.randrange(1000) for _ in range(length)] for length in (1, 2, 63, 64, 65, 300)]
    return [make_request(prompt, max_new_tokens=32) for prompt in prompts]


def test_greedy_tokens_in_fp32_equal_the_cpus() -> None:
    requests = _requests()
    answers = []
    for device in ("cpu", "cuda"):
        engine = LocalEngine(EMBEDDED_MODEL, num_shards=2, device=torch.device(device))
        answers.append(engine.generate(requests))
        engine.close()
    assert answers[0] == answers[1]


def test_bf16_serves_every_request_to_its_end() -> None:
    engine = LocalEngine(EMBEDDED_MODEL, num_shards=2, dtype=torch.bfloat16, device=torch.device("cuda"))
    answers = engine.generate(_requests())
    engine.close()
    assert [len(choices[0]) for choices in answers] == [32] * 6
