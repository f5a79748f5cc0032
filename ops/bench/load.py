"""Load over gRPC: who asks when and for how much, and what each request experienced.

Latencies of an open loop count from the time at which a request was to be sent, not from its sending: a generator that
falls behind would otherwise leave out just the waits that the load has brought about. How far it was behind is on
record. Prompts are drawn before the first request, so that drawing them delays none.
"""

from __future__ import annotations

import array
import asyncio
import dataclasses
import pathlib
import random
import time
from collections.abc import Sequence

from octet.client import AsyncClient, CallError
from ops.simulate.load import read_requests


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to come. In a closed loop the time is ignored."""

    at_s: float
    prompt_tokens: int
    new_tokens: int
    stream_interval: int | None = None
    """Tokens in a chunk after the first; None takes the server's."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a request experienced, in seconds from when it was due."""

    due_s: float
    """In an open loop its planned time, in a closed one that of its sending; in seconds from the beginning of the
    load."""
    lag_s: float = 0.0
    """How much later it was sent."""
    prompt_tokens: int
    token_times_s: tuple[float, ...]
    """When each token came; those of one chunk came together."""
    end_s: float
    error: str = ""
    """The status code that it ended with, if that was none of success."""
    problem: str = ""
    """All that the error said."""

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where there is no other."""
        if len(self.token_times_s) < 2:
            return None
        return (self.token_times_s[-1] - self.ttft_s) / (len(self.token_times_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Times between successive tokens."""
        return [after - before for before, after in zip(self.token_times_s, self.token_times_s[1:], strict=False)]


def poisson(rate: float, num_requests: int, prompt_tokens: int, new_tokens: int, seed: int) -> list[Arrival]:
    """Arrivals with exponential gaps of mean 1 / `rate` seconds."""
    rng, at_s, arrivals = random.Random(seed), 0.0, []
    for _ in range(num_requests):
        at_s += rng.expovariate(rate)
        arrivals.append(Arrival(at_s=at_s, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
    return arrivals


def read_trace(
    file: pathlib.Path, num_requests: int, time_scale: float, length_scale: float, max_len: int
) -> list[Arrival]:
    """The first requests of a Mooncake trace: lines of `timestamp` (ms), `input_length`, `output_length`.

    Args:
        time_scale: 2 plays it twice as fast.
        length_scale: 0.1 makes prompts and answers a tenth as long.
        max_len: the context. Answers are cut to half of it, and prompts to what an answer leaves.

    Raises: ConfigError naming the file, and the line.
    """
    arrivals = []
    for request in read_requests(file, num_requests, "--trace"):
        new_tokens = min(max(1, round(request.new_tokens * length_scale)), max_len // 2)
        prompt_tokens = min(max(1, round(request.prompt_tokens * length_scale)), max_len - new_tokens)
        arrivals.append(Arrival(at_s=request.at_s / time_scale, prompt_tokens=prompt_tokens, new_tokens=new_tokens))
    return arrivals


def draw_prompts(arrivals: Sequence[Arrival], vocab_size: int, draw: random.Random) -> list[array.array[int]]:
    """Random ids for each; packed, as a trace can have very many."""
    return [array.array("I", draw.choices(range(vocab_size), k=arrival.prompt_tokens)) for arrival in arrivals]


async def closed_loop(
    client: AsyncClient, arrivals: Sequence[Arrival], streams: int, vocab_size: int, draw: random.Random
) -> tuple[list[Outcome], float]:
    """`streams` users, each asking again when its answer is complete.

    Args:
        draw: of the prompts.

    Returns: outcomes, and seconds in all.
    """
    prompts = draw_prompts(arrivals, vocab_size, draw)
    waiting, outcomes = list(zip(arrivals, prompts, strict=True))[::-1], list[Outcome]()

    async def user() -> None:
        while waiting:
            outcomes.append(await ask(client, *waiting.pop(), start_s))

    start_s = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(streams)))
    return outcomes, time.perf_counter() - start_s


async def open_loop(
    client: AsyncClient, arrivals: Sequence[Arrival], vocab_size: int, draw: random.Random
) -> tuple[list[Outcome], float]:
    """Each request at its time, however many are under way. Arguments and what is returned: as for `closed_loop`."""
    prompts = draw_prompts(arrivals, vocab_size, draw)

    async def one(arrival: Arrival, prompt: Sequence[int]) -> Outcome:
        await asyncio.sleep(max(0.0, start_s + arrival.at_s - time.perf_counter()))
        return await ask(client, arrival, prompt, start_s, due_s=arrival.at_s)

    start_s = time.perf_counter()
    outcomes = await asyncio.gather(*map(one, arrivals, prompts))
    return list(outcomes), time.perf_counter() - start_s


async def ask(
    client: AsyncClient, arrival: Arrival, prompt: Sequence[int], load_start_s: float, due_s: float | None = None
) -> Outcome:
    """Greedy, as many tokens as asked for.

    Args:
        load_start_s: when the load began, on the clock of `time.perf_counter`.
        due_s: from when latencies count, in seconds since then; None is now.
    """
    sent_s = time.perf_counter() - load_start_s
    due_s = sent_s if due_s is None else due_s
    zero_s = load_start_s + due_s
    times: list[float] = []
    error = problem = ""
    try:
        chunks = client.stream(
            prompt,
            max_new_tokens=arrival.new_tokens,
            ignore_eos=True,
            temperature=0.0,
            stream_interval=arrival.stream_interval,
        )
        async for chunk in chunks:
            times += [time.perf_counter() - zero_s] * len(chunk.token_ids)
    except CallError as failure:
        error, problem = failure.code.name, str(failure)
    return Outcome(
        due_s=due_s,
        lag_s=sent_s - due_s,
        prompt_tokens=arrival.prompt_tokens,
        token_times_s=tuple(times),
        end_s=time.perf_counter() - zero_s,
        error=error,
        problem=problem,
    )
