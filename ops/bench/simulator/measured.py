"""A real cluster under a closed loop: what its clients see, and what its processes and all others take of the cores."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import time
from collections.abc import AsyncIterator, Mapping

from cluster.launch import launch
from octet.client import AsyncClient
from octet.config import OctetConfig
from ops.bench.load import Arrival, Outcome, closed_loop
from ops.bench.processor_time import PROC, machine_s, process_s
from ops.bench.simulator.report import Figures, Others
from ops.bench.summary import require_success, summarize

_OTHERS = "others"
_TIMEOUT_S = 600.0
_IDLE_S = 2.0
_REQUESTS = 4
"""Of each stream, while it is measured what others take for each token."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of one cluster."""

    others: Others
    figures: Figures
    cores: dict[str, float]
    """That each pool used, and all others, while it served the loop."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """Of real clusters and simulated ones."""

    streams: int
    requests: int
    prompt_tokens: int
    new_tokens: int


class Cluster:
    """One that runs, and its clients on the same machine."""

    def __init__(self, client: AsyncClient, vocab_size: int, pools: Mapping[int, str], loop: Loop) -> None:
        """
        Args:
            pools: of its members, by their process.
        """
        self._client, self._vocab_size, self._pools, self._loop = client, vocab_size, pools, loop
        self._draw = random.Random()

    async def measure(self) -> Seen:
        """Raises: UnavailableError if no request of a loop succeeds."""
        await self._run(self._loop.streams, self._loop.streams)
        others, before_s = await self._others(), _processor_s(self._pools)
        outcomes, duration_s = await self._run(self._loop.streams, self._loop.requests)
        after_s = _processor_s(self._pools)
        summary = summarize(outcomes, duration_s, _TIMEOUT_S, _TIMEOUT_S)
        assert summary.ttft_s is not None, "some requests succeeded"
        assert summary.tpot_s is not None, "answers have several tokens"
        return Seen(
            others=others,
            figures=Figures(tokens_per_s=summary.tokens_per_s, ttft_s=summary.ttft_s.p50, tpot_s=summary.tpot_s.p50),
            cores={whose: (after_s[whose] - before_s[whose]) / duration_s for whose in after_s},
        )

    async def _others(self) -> Others:
        """While nothing is asked for, and then with half the streams."""
        streams = max(1, self._loop.streams // 2)
        before_s, begun_s = _processor_s(self._pools)[_OTHERS], time.perf_counter()
        await asyncio.sleep(_IDLE_S)
        idle = (_processor_s(self._pools)[_OTHERS] - before_s) / (time.perf_counter() - begun_s)
        before_s = _processor_s(self._pools)[_OTHERS]
        outcomes, duration_s = await self._run(streams, _REQUESTS * streams)
        taken_s = _processor_s(self._pools)[_OTHERS] - before_s
        tokens = sum(len(outcome.token_times_s) for outcome in outcomes)
        return Others(cores=idle, per_token_s=max(0.0, taken_s - idle * duration_s) / tokens)

    async def _run(self, streams: int, requests: int) -> tuple[list[Outcome], float]:
        one = Arrival(at_s=0.0, prompt_tokens=self._loop.prompt_tokens, new_tokens=self._loop.new_tokens)
        outcomes, duration_s = await closed_loop(self._client, [one] * requests, streams, self._vocab_size, self._draw)
        require_success(outcomes)
        return outcomes, duration_s


@contextlib.asynccontextmanager
async def started(config: OctetConfig, loop: Loop) -> AsyncIterator[Cluster]:
    """Raises: OctetError."""
    running = await asyncio.to_thread(launch, config)
    try:
        async with AsyncClient(running.address, timeout_s=_TIMEOUT_S) as client:
            vocab_size = (await client.model_info()).vocab_size
            pools = {member.pid: pool.name for pool in (await client.status()).pools for member in pool.members}
            yield Cluster(client, vocab_size, pools, loop)
    finally:
        await asyncio.to_thread(running.stop, drain=False)


def _processor_s(pools: Mapping[int, str]) -> dict[str, float]:
    """Processor time so far, of the processes of each pool, and of all others of this machine (Linux)."""
    used_s = dict.fromkeys([_OTHERS, *pools.values()], 0.0)
    used_s[_OTHERS] = machine_s()
    for pid, pool in pools.items():
        own_s = process_s(PROC / str(pid))
        used_s[pool] += own_s
        used_s[_OTHERS] -= own_s
    return used_s
