"""`octet bench degraded`: what a cluster still serves when one of its expert shards is dead and not replaced."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from cluster.launch import RunningCluster
from cluster.planning import EMBEDDED_MODEL
from octet.client import CallError
from octet.errors import UnavailableError
from ops.bench.changes.command import ChangesOptions, own_cluster, under_load
from ops.bench.changes.gaps import Outcomes, Window, look, outcomes
from ops.bench.changes.stage import Stage, members, settled
from ops.bench.machine import Machine, describe

_PAUSE_S, _POLL_S, _GIVE_UP_S = 2.0, 0.2, 120.0
_MARGIN = 0.05
"""By so much more than its share throughput may fall."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Tokens per second, without and with a shard less; windows of equal length, one after the other."""

    whole_per_s: float
    degraded_per_s: float

    @property
    def ratio(self) -> float:
        return self.degraded_per_s / self.whole_per_s if self.whole_per_s else 0.0


def least(shards: int) -> float:
    """The goal for one that is dead of so many: no more is lost than its share, and a margin."""
    return 1 - 1 / shards - _MARGIN


def bench_degraded(
    model_dir: pathlib.Path | None,
    options: ChangesOptions,
    shards: int,
    window_s: float,
    json_file: pathlib.Path | None,
) -> int:
    """Print throughput with all shards and with one killed, in turns, and the ratio.

    Returns: 0, or 1 if a request failed or an answer differed.
    Raises: CallError, ConfigError, OctetError.
    """
    model_dir = EMBEDDED_MODEL if model_dir is None else model_dir
    machine, console = describe(), Console(highlight=False)
    fields = (f"pools.experts.size={shards}",)
    with console.status("starting a cluster") as status, own_cluster(model_dir, options, fields) as cluster:
        rounds, ended = asyncio.run(_run(cluster, options, shards, window_s, status.update))
    _print(machine, rounds, ended, shards, console)
    if json_file is not None:
        report = {"machine": dataclasses.asdict(machine), "shards": shards, "load": dataclasses.asdict(options)}
        report |= {"rounds": [dataclasses.asdict(one) for one in rounds], "outcomes": dataclasses.asdict(ended)}
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if ended.problems or ended.different else 0


async def _run(
    cluster: RunningCluster, options: ChangesOptions, shards: int, window_s: float, say: Callable[[str], None]
) -> tuple[list[Round], Outcomes]:
    windows: list[tuple[Window, Window]] = []
    begin_s = time.monotonic()
    async with under_load(cluster, options) as (stage, streams):
        for number in range(options.repeats):
            say(f"{number + 1} of {options.repeats}")
            await stage.scale("experts", shards)
            whole = await _window(window_s)
            await _lose(stage, shards)
            windows.append((whole, await _window(window_s)))
    found = [
        Round(
            whole_per_s=look(streams.answers, whole).tokens_per_s,
            degraded_per_s=look(streams.answers, degraded).tokens_per_s,
        )
        for whole, degraded in windows
    ]
    return found, outcomes(streams.answers, [Window(begin_s, time.monotonic())])


async def _window(length_s: float) -> Window:
    await asyncio.sleep(_PAUSE_S)
    begin_s = time.monotonic()
    await asyncio.sleep(length_s)
    return Window(begin_s, time.monotonic())


async def _lose(stage: Stage, shards: int) -> None:
    """Kill a shard, and ask for one less, so that nobody takes its place. Raises: UnavailableError."""
    worker_id, victim = random.choice(sorted(members(await stage.client.status(), "experts").items()))
    os.kill(victim.pid, signal.SIGKILL)
    deadline_s = time.monotonic() + _GIVE_UP_S
    while True:
        # A loss that is being dealt with comes before what anybody asks for.
        with contextlib.suppress(CallError):
            await stage.scale("experts", shards - 1)
        status = await stage.client.status()
        left = members(status, "experts")
        if settled(status) and worker_id not in left and len(left) == shards - 1:
            return
        if time.monotonic() > deadline_s:
            raise UnavailableError(f"not within {_GIVE_UP_S} s: the cluster goes on with {shards - 1} shards")
        await asyncio.sleep(_POLL_S)


def _print(machine: Machine, rounds: Sequence[Round], ended: Outcomes, shards: int, console: Console) -> None:
    console.print(machine.line)
    table = Table(box=None, pad_edge=False)
    for name in ("round", f"tokens/s, {shards} shards", f"{shards - 1}, one dead", "ratio"):
        table.add_column(name, justify="right")
    for number, one in enumerate(rounds, 1):
        table.add_row(f"{number}", f"{one.whole_per_s:.0f}", f"{one.degraded_per_s:.0f}", f"{one.ratio:.2f}")
    console.print(table)
    ratios = sorted(one.ratio for one in rounds)
    goal = least(shards)
    console.print(
        f"median {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), goal at least {goal:.2f}; "
        f"{ended.answers} answers, {ended.different} different, {len(ended.problems)} failed"
    )
