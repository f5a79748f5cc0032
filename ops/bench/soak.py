"""`octet bench soak`: mixed random load on a cluster of its own, with the memory of every process of it watched.

Requests have random lengths, several choices, shared beginnings; some are left midway, aborted, or given a deadline
that passes. Every process that this one has started, Ray's own included, is sampled.

Memory counts as flat if it does not grow in the second half: the first fills caches, touches the KV pages and lets
allocators find their size. What is sampled is anonymous memory, since pages of files come and go with the page cache.
The slope is that of Theil and Sen (the median over all pairs of samples), which a few spikes do not move. What it adds
over the second half may be 1% of the process or 2 MiB, whichever is more: less is not to be told from the comings and
goings of a minute. In ten minutes that finds a leak of a few hundred bytes per request, in an hour of a few dozen.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import statistics
import time
import uuid
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.launch import launch
from octet.client import AsyncClient, CallError
from octet.config import load_config
from octet.v1 import octet_pb2 as pb

_RAYLET = b"RAY_RAYLET_PID="
_SAMPLE_S = 5.0
_SETTLE_S = 20.0
_MAX_GROWTH, _MAX_GROWTH_BYTES = 0.01, 2 * 2**20
"""Over the second half, the larger of the two."""
_OVERRIDES = (
    "frontend.port=0",
    "pools.prefill.size=2",
    "pools.decode.size=2",
    "kv.prefill_pages=160",
    "kv.decode_pages=160",
)
"""Few pages: all of them have been used after a minute, and sequences are preempted now and then."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    at_s: float
    resident: dict[tuple[int, str], int]
    """Bytes of anonymous memory by (pid, name)."""


def bench_soak(seconds: float, users: int, json_file: pathlib.Path | None) -> int:
    """Print what was served and each process's memory. Returns: 0 if all is well, else 1."""
    overrides = [f"ray.namespace=octet-{uuid.uuid4().hex[:8]}", *_OVERRIDES]
    cluster = launch(load_config(overrides=overrides))
    try:
        samples, ended, held = asyncio.run(_soak(cluster.address, seconds, users))
    finally:
        cluster.stop(drain=False)
    if json_file is not None:
        rows = [{"at_s": s.at_s, **{f"{name}/{pid}": b for (pid, name), b in s.resident.items()}} for s in samples]
        json_file.write_text(json.dumps(rows) + "\n")
    console = Console(highlight=False)
    requests = sum(ended.values())
    console.print(f"{requests} requests: {', '.join(f'{count} {how}' for how, count in sorted(ended.items()))}")
    grew = report_growth(samples, console)
    unexpected = {how: count for how, count in ended.items() if how.startswith("error")}
    for complaint in (
        f"memory is not flat in: {'; '.join(grew)}" if grew else "",
        f"requests failed: {unexpected}" if unexpected else "",
        held,
    ):
        if complaint:
            console.print(Text.assemble(("not well:", "bold red"), f" {complaint}"))
    return 1 if grew or unexpected or held else 0


async def random_request(client: AsyncClient, request_id: str, prefixes: list[list[int]]) -> str:
    """One request that ends in one of the ways in which requests end; which one.

    Raises: CallError if it ends in a way that it should not; AssertionError if the answer is not as long as asked for.
    """
    prompt = random.choices(range(1000), k=random.choice([1, 5, 16, 17, 100, 300, 700]))
    if random.random() < 0.3:
        prompt = random.choice(prefixes) + prompt[:100]
    n, new_tokens = random.choice([1, 1, 1, 2, 3]), random.choice([1, 2, 10, 40])
    options: dict[str, Any] = {
        "request_id": request_id,
        "max_new_tokens": new_tokens,
        "n": n,
        "temperature": random.choice([0.0, 1.0]),
        "ignore_eos": True,
    }
    how = random.choice(["whole", "whole", "left", "aborted", "deadline"])
    if how == "whole":
        response = await client.generate(prompt, **options)
        assert [len(choice.token_ids) for choice in response.choices] == [new_tokens] * n
    elif how == "left":
        stream = client.stream(prompt, **options)
        for _ in range(random.randrange(1, 4)):
            await anext(stream, None)
        await stream.aclose()
    elif how == "aborted":
        call = asyncio.create_task(client.generate(prompt, **options))
        await asyncio.sleep(random.random() * 0.3)
        await client.abort(request_id)
        await call
    else:
        try:
            await client.generate(prompt, timeout_s=0.01 + random.random() * 0.5, **options)
        except CallError as error:
            # What could not be done in time is refused at once, once the rates of the pools are known.
            ends = {"DEADLINE_EXCEEDED": "past their deadline", "RESOURCE_EXHAUSTED": "refused"}
            if error.code.name not in ends:
                raise
            return ends[error.code.name]
        return "whole"
    return how


def random_prefixes(count: int = 4) -> list[list[int]]:
    return [random.choices(range(1000), k=random.choice([32, 150, 400])) for _ in range(count)]


async def _soak(address: str, seconds: float, users: int) -> tuple[list[Sample], collections.Counter[str], str]:
    """Samples, how requests ended, and what is still held at the end, if anything."""
    ended: collections.Counter[str] = collections.Counter()
    start_s = time.monotonic()
    samples: list[Sample] = []
    async with AsyncClient(address, timeout_s=120.0) as client:

        async def user(number: int) -> None:
            prefixes, count = random_prefixes(), 0
            while time.monotonic() - start_s < seconds:
                count += 1
                if count % 200 == 0:
                    prefixes = random_prefixes()
                try:
                    ended[await random_request(client, f"user-{number}-{count}", prefixes)] += 1
                except (CallError, AssertionError) as error:
                    ended[f"error {error}"] += 1

        running = asyncio.gather(*(user(number) for number in range(users)))
        while not running.done():
            samples.append(Sample(time.monotonic() - start_s, await asyncio.to_thread(family_memory)))
            await asyncio.wait([running], timeout=_SAMPLE_S)
        await running
        return samples, ended, await _held(client)


async def _held(client: AsyncClient) -> str:
    """What is not back at its baseline after a while: live requests, pages, leases."""
    deadline_s = time.monotonic() + _SETTLE_S
    while True:
        status = await client.status()
        held = [f"{status.live_requests} live requests"] if status.live_requests else []
        held += [_holding(member) for pool in status.pools if pool.name != "experts" for member in pool.members]
        if not any(held) or time.monotonic() > deadline_s:
            return "; ".join(filter(None, held))
        await asyncio.sleep(0.2)


def _holding(member: pb.Member) -> str:
    pages = member.kv_pages_total - member.kv_pages_free
    if pages == member.leases == member.running == member.waiting == 0:
        return ""
    return (
        f"{member.worker_id} holds {pages} pages, {member.leases} leases, {member.running + member.waiting} sequences"
    )


def family_memory() -> dict[tuple[int, str], int]:
    """Anonymous resident bytes of this process and all below it, by (pid, name)."""
    names, parents = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # A process may call itself what is no text.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
                words = (entry / "cmdline").read_text(errors="replace").replace("\0", " ").split()
            except OSError:
                continue
            pid = int(entry.name)
            parents[pid] = int(fields[1]) if fields[1] != "1" else _raylet_of(entry)
            names[pid] = _name(words)
    memory = {}
    for pid, name in names.items():
        ancestor = pid
        while ancestor not in (0, os.getpid()):
            ancestor = parents.get(ancestor, 0)
        if ancestor == os.getpid() and (anonymous := _anonymous_bytes(pid)) is not None:
            memory[pid, "this process" if pid == os.getpid() else name] = anonymous
    return memory


def _raylet_of(entry: pathlib.Path) -> int:
    """Whose process it is that has outlived its parent, as a server of forks does; 0 if no raylet's."""
    with contextlib.suppress(OSError, ValueError):
        for line in (entry / "environ").read_bytes().split(b"\0"):
            if line.startswith(_RAYLET):
                return int(line.removeprefix(_RAYLET))
    return 0


def _name(words: list[str]) -> str:
    """The program, or what the interpreter runs."""
    if not words:
        return "?"
    program = pathlib.Path(words[0]).name
    script = next((word for word in words[1:] if word.endswith(".py")), "")
    return f"{program} {pathlib.Path(script).name}" if program.startswith("python") and script else program


def _anonymous_bytes(pid: int) -> int | None:
    try:
        lines = pathlib.Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), None)


def report_growth(samples: list[Sample], console: Console) -> list[str]:
    """Print a line per process. Returns: those whose memory grows, or that did not live throughout."""
    half = samples[len(samples) // 2 :]
    table = Table(box=None, pad_edge=False)
    for column in ("process", "start MiB", "half MiB", "end MiB", "2nd half's growth MiB", "may be"):
        table.add_column(column, justify="left" if column == "process" else "right")
    grew = []
    # By pid alone: Ray writes the method that an actor is running into the name of its process.
    by_pid = [{pid: value for (pid, _), value in sample.resident.items()} for sample in samples]
    in_half = by_pid[len(samples) // 2 :]
    for pid, name in sorted(samples[0].resident, key=lambda key: key[1]):
        name = name.partition(".")[0] if name.startswith("ray::") else name
        if any(pid not in memory for memory in by_pid):
            grew.append(f"{name}, which ended midway")
            continue
        slope = theil_sen([sample.at_s for sample in half], [memory[pid] for memory in in_half])
        growth = slope * (half[-1].at_s - half[0].at_s)
        allowed = max(_MAX_GROWTH * in_half[0][pid], _MAX_GROWTH_BYTES)
        grew += [name] if growth > allowed else []
        points = (by_pid[0][pid], in_half[0][pid], in_half[-1][pid])
        mib = (f"{value / 2**20:.1f}" for value in points)
        table.add_row(Text(name), *mib, f"{growth / 2**20:+.2f}", f"{allowed / 2**20:.2f}")
    console.print(table)
    return grew


def theil_sen(x: list[float], y: list[int]) -> float:
    """The median slope over all pairs of points (Sen, 1968)."""
    pairs = ((i, j) for i in range(len(x)) for j in range(i + 1, len(x)) if x[j] > x[i])
    return statistics.median([(y[j] - y[i]) / (x[j] - x[i]) for i, j in pairs] or [0.0])
