"""Streams that never end: users who ask again as soon as they are answered, and compare what they get."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any

from octet.client import AsyncClient, CallError
from ops.bench.changes.gaps import Answer

Prompt = tuple[int, ...]
GREEDY: dict[str, Any] = {"ignore_eos": True, "temperature": 0.0}


class Streams:
    """So many users, each with one request at a time, as long as the context is open."""

    def __init__(self, client: AsyncClient, expected: Mapping[Prompt, Sequence[int]], count: int) -> None:
        """
        Args:
            expected: greedy answers by prompt.
        """
        self._client, self._expected, self._count = client, expected, count
        self._stopping = False
        self._users: list[asyncio.Task[None]] = []
        self.answers: list[Answer] = []

    async def __aenter__(self) -> Streams:
        self._users = [asyncio.create_task(self._use(number)) for number in range(self._count)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._users)

    async def _use(self, number: int) -> None:
        draw, prompts = random.Random(number), list(self._expected)
        while not self._stopping:
            prompt = draw.choice(prompts)
            answer = Answer(sent_s=time.monotonic())
            self.answers.append(answer)
            await self._ask(prompt, answer)
            answer.ended_s = time.monotonic()
            if answer.problem:
                # One that is refused at once is not asked again at once.
                await asyncio.sleep(0.1)

    async def _ask(self, prompt: Prompt, answer: Answer) -> None:
        expected = self._expected[prompt]
        found: list[int] = []
        try:
            async for chunk in self._client.stream(list(prompt), max_new_tokens=len(expected), **GREEDY):
                answer.times_s += [time.monotonic()] * len(chunk.token_ids)
                found += chunk.token_ids
        except CallError as error:
            answer.problem = str(error)
            return
        if len(found) != len(expected):
            answer.problem = f"{len(found)} tokens instead of {len(expected)}"
        else:
            answer.differs = found != expected


async def quiet_answers(
    client: AsyncClient, vocab_size: int, count: int, prompt_tokens: int, new_tokens: int
) -> dict[Prompt, list[int]]:
    """What the cluster makes of random prompts while nothing changes."""
    prompts = [tuple(random.choices(range(vocab_size), k=prompt_tokens)) for _ in range(count)]
    responses = await asyncio.gather(
        *(client.generate(list(prompt), max_new_tokens=new_tokens, **GREEDY) for prompt in prompts)
    )
    return {p: list(response.choices[0].token_ids) for p, response in zip(prompts, responses, strict=True)}
