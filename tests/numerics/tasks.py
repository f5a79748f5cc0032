"""Requests whose answers are known and do not hang on rounding.

Requests whose decisions are ties but for rounding are drawn again; `tests/reference.py` says why.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import torch

from model.sampler import filtered_probabilities, uniform
from octet.messages import PrefillRequest
from octet.request import Sampling
from ops.local import LocalEngine, make_request
from tests.reference import ARGMAX_MARGIN, MAX_DRAWS, ROUTING_MARGIN, Reference, argmax_margin, random_prompt

NUM_NEW_TOKENS = 32
VOCAB_SIZE = 64  # Small, so that few boundaries between tokens lie near the number drawn.
DRAW_MARGIN = 1e-5
"""Distance of a number drawn from the nearest boundary between two tokens. Logits were seen to change by 1e-5."""
CUTOFF_MARGIN = 2e-6
"""Distance of the probabilities cut off by `top_p` from `1 - top_p`, which is a tenth."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    prompt: list[int]
    sampling: Sampling
    choices: tuple[int, ...]
    answer: list[list[int]]
    """The token ids of each choice."""

    def request(self) -> PrefillRequest:
        return make_request(self.prompt, max_new_tokens=NUM_NEW_TOKENS, sampling=self.sampling, choices=self.choices)


def answers(engine: LocalEngine, tasks: Sequence[Task]) -> list[list[list[int]]]:
    return engine.generate([task.request() for task in tasks], timeout_s=60.0)


def draw_task(
    reference: Reference,
    engine: LocalEngine,
    length: int,
    *,
    sampled: bool,
    choices: tuple[int, ...] = (0,),
    vocab_size: int = VOCAB_SIZE,
) -> Task:
    for _ in range(MAX_DRAWS):
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=random.randrange(2**63)) if sampled else Sampling()
        task = Task(prompt=random_prompt(length, vocab_size), sampling=sampling, choices=choices, answer=[])
        (answer,) = answers(engine, [task])
        if all(is_clear(reference, task, choice, tokens) for choice, tokens in zip(choices, answer, strict=True)):
            return dataclasses.replace(task, answer=answer)
    raise AssertionError(f"{MAX_DRAWS} draws gave no clear request of {length} tokens")


def is_clear(reference: Reference, task: Task, choice: int, token_ids: Sequence[int]) -> bool:
    """Whether rounding can change no decision on the way to these tokens."""
    judgement = reference.judge([*task.prompt, *token_ids[:-1]])
    if judgement.routing_margin < ROUTING_MARGIN:
        return False
    logits_TV = judgement.logits_TV[len(task.prompt) - 1 :]
    if task.sampling.greedy:
        return argmax_margin(logits_TV) >= ARGMAX_MARGIN
    return draw_is_clear(logits_TV, task, choice)


def draw_is_clear(logits_TV: torch.Tensor, task: Task, choice: int) -> bool:
    sampling = task.sampling
    points = [uniform(sampling.seed, choice, len(task.prompt) + index) for index in range(len(logits_TV))]
    boundaries_TV = filtered_probabilities(logits_TV, [sampling] * len(logits_TV)).cumsum(-1)
    distances_TV = (boundaries_TV - torch.tensor(points, dtype=torch.float64).unsqueeze(1)).abs()
    all_TV = (logits_TV.double() / sampling.temperature).softmax(-1)
    cut_TV = all_TV.sort(dim=-1).values.cumsum(-1) - (1 - sampling.top_p)
    return distances_TV.min().item() >= DRAW_MARGIN and cut_TV.abs().min().item() >= CUTOFF_MARGIN
