"""`octet demo --chaos`: texts go on being written while the processes that write them are killed."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cluster.launch import RunningCluster
from octet.client import AsyncClient
from ops.chaos.history import Injected
from ops.chaos.inject import play
from ops.chaos.own import own_cluster
from ops.chaos.schedule import Event, Kill, Schedule, Target
from ops.chaos.stage import Stage
from ops.progress import StartDisplay

_PROMPTS = (
    "The history of bread begins",
    "When the weather turns cold, a machine",
    "Eight letters make",
    "The river was wide, and",
)
_NEW_TOKENS, _TIMEOUT_S = 160, 120.0
_VICTIMS: tuple[Target, ...] = ("experts", "decode", "prefill", "router", "controller")
_PAUSE_S, _REFRESH_S = 2.0, 0.1
_SHOWN = 70


@dataclasses.dataclass(slots=True)
class _Writing:
    """One text, over and over."""

    prompt: str
    expected: str
    text: str = ""
    tokens: int = 0
    longest_gap_s: float = 0.0
    same: int = 0
    different: int = 0


def demo_chaos() -> int:
    """Kill one of everybody while texts are written, and compare. Returns: 0 if no text was changed, else 1."""
    console = Console(highlight=False)
    with contextlib.ExitStack() as stack:
        with StartDisplay(Console(stderr=True)) as display:
            cluster = stack.enter_context(own_cluster(None, report=display.show))
        return asyncio.run(_show(cluster, console))


async def _show(cluster: RunningCluster, console: Console) -> int:
    async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
        console.print("four texts as they are without faults, to compare with:")
        writings = []
        for prompt in _PROMPTS:
            answer = await client.generate(prompt, max_new_tokens=_NEW_TOKENS, temperature=0.0, ignore_eos=True)
            writings.append(_Writing(prompt, answer.choices[0].text))
        stage, faults, begin_s = Stage(cluster.plan, cluster.address, client), list[Injected](), time.time()
        async with _written(client, writings), _shown(writings, faults, begin_s, console):
            for victim in _VICTIMS:
                await asyncio.sleep(_PAUSE_S)
                kill: Event = Kill(at_s=0, target=victim)
                faults += await play(stage, Schedule(duration_s=0.1, events=(kill,)), time.time())
                if not console.is_terminal:
                    console.print(_line(faults[-1], begin_s))
            await asyncio.sleep(_PAUSE_S)
    different = sum(writing.different for writing in writings)
    console.print(
        f"{sum(writing.same for writing in writings)} texts were written while {len(faults)} processes were killed, "
        f"{different} of them not token for token as without; "
        f"the longest pause in any was {max(writing.longest_gap_s for writing in writings):.2f} s"
    )
    return int(different > 0)


@contextlib.asynccontextmanager
async def _written(client: AsyncClient, writings: list[_Writing]) -> AsyncIterator[None]:
    stopping = asyncio.Event()
    tasks = [asyncio.create_task(_write(client, writing, stopping)) for writing in writings]
    try:
        yield
    finally:
        stopping.set()
        await asyncio.gather(*tasks)


async def _write(client: AsyncClient, writing: _Writing, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        writing.text, last_s = "", time.monotonic()
        options = {"max_new_tokens": _NEW_TOKENS, "temperature": 0.0, "ignore_eos": True}
        async for chunk in client.stream(writing.prompt, **options):
            now_s = time.monotonic()
            writing.longest_gap_s, last_s = max(writing.longest_gap_s, now_s - last_s), now_s
            writing.text += chunk.text
            writing.tokens += len(chunk.token_ids)
        if writing.text == writing.expected:
            writing.same += 1
        else:
            writing.different += 1


@contextlib.asynccontextmanager
async def _shown(
    writings: list[_Writing], faults: list[Injected], begin_s: float, console: Console
) -> AsyncIterator[None]:
    """On a terminal, as it is written."""
    if not console.is_terminal:
        yield
        return
    with Live(console=console, auto_refresh=False) as live:

        async def refresh() -> None:
            while True:
                live.update(_picture(writings, faults, begin_s), refresh=True)
                await asyncio.sleep(_REFRESH_S)

        task = asyncio.create_task(refresh())
        try:
            yield
        finally:
            task.cancel()
            live.update(_picture(writings, faults, begin_s), refresh=True)


def _picture(writings: list[_Writing], faults: list[Injected], begin_s: float) -> Group:
    table = Table(box=None, pad_edge=False)
    for title in ("", "tokens", "longest pause", "texts as without faults"):
        table.add_column(title, justify="left" if not title else "right")
    for writing in writings:
        shown = (writing.prompt + writing.text).replace("\n", " ")[-_SHOWN:]
        whole = f"{writing.same} of {writing.same + writing.different}"
        table.add_row(Text(shown), str(writing.tokens), f"{writing.longest_gap_s:.2f} s", whole)
    return Group(table, *(Text(_line(fault, begin_s), style="red") for fault in faults))


def _line(fault: Injected, begin_s: float) -> str:
    return f"{fault.at_s - begin_s:5.1f} s  {fault.what}; gone on without it after {fault.until_s - fault.at_s:.2f} s"
