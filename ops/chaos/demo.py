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
    """Kill one of everybody while texts are written, and compare.

    Returns: 0 if everybody was killed, and done without, and no text was changed; else 1.
    """
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
                    console.print(line_of(faults[-1], begin_s), markup=False)
            await asyncio.sleep(_PAUSE_S)
    same, different = (sum(getattr(one, of_which) for one in writings) for of_which in ("same", "different"))
    lost = sum(map(done_without, faults))
    console.print(
        f"{same + different} texts were written while {lost} of {len(faults)} processes were killed and done without, "
        f"{different} of them not token for token as without; "
        f"the longest pause in any was {max(writing.longest_gap_s for writing in writings):.2f} s"
    )
    return int(different > 0 or lost < len(faults))


def done_without(fault: Injected) -> bool:
    """Whether a kill came about, and the cluster went on."""
    return fault.fired and not fault.note


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
    return Group(table, *(Text(line_of(fault, begin_s), style="red") for fault in faults))


def line_of(fault: Injected, begin_s: float) -> str:
    """What came of a kill."""
    begun, lasted_s = f"{fault.at_s - begin_s:5.1f} s  {fault.what}; ", fault.until_s - fault.at_s
    if done_without(fault):
        return f"{begun}gone on without it after {lasted_s:.2f} s"
    return f"{begun}{fault.note}, for {lasted_s:.2f} s" if fault.fired else f"{begun}it was not killed: {fault.note}"
