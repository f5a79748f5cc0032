"""Pages, leases and counts after a thousand requests that end in every possible way."""

from __future__ import annotations

import asyncio
import collections
import random
from typing import Any

import pytest

from octet.client import AsyncClient, CallError, Client
from tests.cluster.conftest import Start, at_baseline, wait_until

_REQUESTS, _AT_ONCE = 1000, 40


async def _one(client: AsyncClient, number: int, ended: collections.Counter[str]) -> None:
    prompt = [random.randrange(1000) for _ in range(random.choice([1, 5, 16, 17, 100, 300, 700]))]
    n, new_tokens = random.choice([1, 1, 1, 2, 3]), random.choice([1, 2, 10, 40])
    options: dict[str, Any] = {
        "request_id": f"r{number}",
        "max_new_tokens": new_tokens,
        "n": n,
        "temperature": random.choice([0.0, 1.0]),
        "ignore_eos": True,
    }
    how = random.choice(["whole", "whole", "leave", "abort", "deadline"])
    if how == "whole":
        response = await client.generate(prompt, **options)
        assert [len(choice.token_ids) for choice in response.choices] == [new_tokens] * n
    elif how == "leave":
        stream = client.stream(prompt, **options)
        for _ in range(random.randrange(1, 4)):
            await anext(stream, None)
        await stream.aclose()
    elif how == "abort":
        call = asyncio.create_task(client.generate(prompt, **options))
        await asyncio.sleep(random.random() * 0.3)
        await client.abort(f"r{number}")
        await call
    else:
        try:
            await client.generate(prompt, timeout_s=random.random() * 0.5, **options)
        except CallError as error:
            ended[error.code.name] += 1
    ended[how] += 1


@pytest.mark.timeout(200)
async def test_a_thousand_random_requests_leave_nothing_behind(start: Start) -> None:
    cluster = await asyncio.to_thread(
        start, "pools.prefill.size=2", "pools.decode.size=2", "kv.prefill_pages=300", "kv.decode_pages=300"
    )
    ended: collections.Counter[str] = collections.Counter()
    gate = asyncio.Semaphore(_AT_ONCE)
    async with AsyncClient(cluster.address, timeout_s=60) as client:

        async def gated(number: int) -> None:
            async with gate:
                await _one(client, number, ended)

        await asyncio.gather(*map(gated, range(_REQUESTS)))
    with Client(cluster.address, timeout_s=30) as blocking:
        wait_until(lambda: at_baseline(blocking.status()), 20, "pages back to baseline")
        status = blocking.status()
    assert status.requests_failed == 0
    # A deadline may pass before the server has heard of the request, which then counts nowhere.
    accounted = status.requests_finished + status.requests_cancelled
    assert _REQUESTS - ended["DEADLINE_EXCEEDED"] <= accounted <= _REQUESTS
    assert set(ended) <= {"whole", "leave", "abort", "deadline", "DEADLINE_EXCEEDED"}
    await asyncio.to_thread(cluster.stop)
