"""Questions and their answers without faults, which faults must not change.

A step that is run again on other shards adds the same numbers in another order, and so does a prompt that is computed
again with the tokens so far. Where two tokens, or two experts, are as good as equally likely, that may decide between
them. Questions in whose answers that happens are left out: greedy ones by the margin between the best two tokens,
sampled ones by whether a slightly different temperature changes a token, and both by whether the answer goes on as it
did when it is asked for from the middle.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random

from octet.client import AsyncClient
from octet.errors import UnavailableError
from ops.chaos.clients import options_of
from ops.chaos.history import Ids, Question

_LEAST_MARGIN = 2e-4
"""In log-probability."""
_OTHER_TEMPERATURES = (0.99995, 1.00005)
_RESTARTS = (0.25, 0.5, 0.75)
"""After what part of an answer it is asked for anew."""
_MOST_TRIES = 20


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How many questions, and how long."""

    greedy: int = 4
    sampled: int = 3
    prompt_tokens: int = 24
    new_tokens: int = 48
    seed: int = 0


async def make_questions(client: AsyncClient, asked: Asked) -> list[Question]:
    """Raises: CallError; UnavailableError if the model hardly ever prefers one token."""
    draw, vocab_size = random.Random(asked.seed), (await client.model_info()).vocab_size
    found: list[Question] = []
    for number in range(asked.greedy + asked.sampled):
        greedy = number < asked.greedy
        for _ in range(_MOST_TRIES):
            length = draw.randint(2, asked.prompt_tokens)
            question = Question(
                name=f"{'greedy' if greedy else 'sampled'} {number}",
                prompt=tuple(draw.randrange(3, vocab_size) for _ in range(length)),
                max_new_tokens=asked.new_tokens,
                seed=None if greedy else draw.randrange(1, 2**31),
                temperature=0.0 if greedy else 0.8,
                # One of them has two choices.
                num_choices=2 if number == asked.greedy else 1,
                expected=(),
            )
            expected = await (_greedy if greedy else _sampled)(client, question)
            if expected is not None and await _goes_on(client, question, expected[0]):
                found.append(dataclasses.replace(question, expected=expected))
                break
        else:
            raise UnavailableError(f"no answer of {_MOST_TRIES} was clear enough to be compared with")
    return found


async def _greedy(client: AsyncClient, question: Question) -> tuple[Ids, ...] | None:
    """The answer, or None where it hangs by a thread."""
    answer = await client.generate(list(question.prompt), logprobs=2, **options_of(question))
    for choice in answer.choices:
        for token in choice.logprobs:
            best, second = sorted((top.logprob for top in token.top), reverse=True)[:2]
            if best - second < _LEAST_MARGIN:
                return None
    return tuple(tuple(choice.token_ids) for choice in answer.choices)


async def _goes_on(client: AsyncClient, question: Question, answer: Ids) -> bool:
    """Whether the rest of the answer follows the prompt with any beginning of it."""

    async def same_rest(told: int) -> bool:
        options = {**options_of(question), "n": 1, "max_new_tokens": len(answer) - told}
        rest = await client.generate([*question.prompt, *answer[:told]], **options)
        return tuple(rest.choices[0].token_ids) == answer[told:]

    return all(await asyncio.gather(*(same_rest(int(part * len(answer))) for part in _RESTARTS)))


async def _sampled(client: AsyncClient, question: Question) -> tuple[Ids, ...] | None:
    temperatures = (question.temperature, *(question.temperature * factor for factor in _OTHER_TEMPERATURES))
    answers = await asyncio.gather(
        *(
            client.generate(list(question.prompt), **{**options_of(question), "temperature": temperature})
            for temperature in temperatures
        )
    )
    ids = {tuple(tuple(choice.token_ids) for choice in answer.choices) for answer in answers}
    return ids.pop() if len(ids) == 1 else None
