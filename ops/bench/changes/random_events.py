"""Pools that are scaled at random, over and over, while streams run; afterwards nothing may be left of it."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octet.client import CallError
from ops.bench.changes.gaps import Outcomes
from ops.bench.changes.leftovers import Holdings
from ops.bench.changes.stage import Stage
from ops.bench.machine import Machine

LARGEST = {"experts": 4, "prefill": 2, "decode": 2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    pool: str
    size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What came of an event."""

    event: Event
    duration_s: float
    problem: str = ""


def draw_events(count: int, seed: int, sizes: Mapping[str, int]) -> Iterator[Event]:
    """Each brings one pool to another size than it has, from 1 to the largest."""
    draw, now = random.Random(seed), dict(sizes)
    for _ in range(count):
        pool = draw.choice(sorted(LARGEST))
        now[pool] = draw.choice([size for size in range(1, LARGEST[pool] + 1) if size != now[pool]])
        yield Event(pool=pool, size=now[pool])


async def play(stage: Stage, count: int, seed: int, say: Callable[[str], None]) -> list[Ended]:
    """All events, and back to the sizes in the beginning. A refused one is on record and does not end it."""
    ended = []
    events = [*draw_events(count, seed, stage.sizes), *(Event(pool=p, size=s) for p, s in stage.sizes.items())]
    for number, event in enumerate(events):
        say(f"event {number + 1} of {len(events)}: {event.pool} → {event.size}")
        begin_s, problem = time.monotonic(), ""
        try:
            await stage.scale(event.pool, event.size)
        except CallError as error:
            problem = str(error)
        ended.append(Ended(event=event, duration_s=time.monotonic() - begin_s, problem=problem))
    return ended


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RandomReport:
    events: list[Ended]
    outcomes: Outcomes
    longest_gap_s: float
    longest_wait_s: float
    left: list[str]
    before: Holdings
    after: Holdings

    @property
    def well(self) -> bool:
        return not (self.left or self.outcomes.problems or any(ended.problem for ended in self.events))


def print_report(machine: Machine, report: RandomReport, seed: int, console: Console) -> None:
    out, seconds = report.outcomes, sum(ended.duration_s for ended in report.events)
    console.print(machine.line)
    console.print(
        f"{len(report.events)} changes of size (seed {seed}) in {seconds:.0f} s; {out.answers} answers, "
        f"{out.different} not as quiet, {len(out.problems)} failed; longest gap {report.longest_gap_s:.2f} s, "
        f"longest wait for a first token {report.longest_wait_s:.2f} s"
    )
    table = Table(box=None, pad_edge=False)
    for title in ("process", "open files before", "after", "threads before", "after"):
        table.add_column(title, justify="left" if title == "process" else "right")
    for name, (files, threads) in report.before.handles.items():
        if name in report.after.handles:
            files_after, threads_after = report.after.handles[name]
            table.add_row(name, *map(str, (files, files_after, threads, threads_after)))
    console.print(table)
    complaints = [f"{e.event.pool} → {e.event.size}: {e.problem}" for e in report.events if e.problem]
    for complaint in [*complaints, *sorted(set(out.problems)), *(f"left behind: {left}" for left in report.left)]:
        console.print("[bold red]not well:[/]", escape(complaint))


def as_json(machine: Machine, report: RandomReport, seed: int) -> dict[str, Any]:
    return {
        "schema": "octet.random_changes/1",
        "machine": dataclasses.asdict(machine),
        "seed": seed,
        "events": [dataclasses.asdict(ended) for ended in report.events],
        "outcomes": dataclasses.asdict(report.outcomes),
        "longest_gap_s": report.longest_gap_s,
        "longest_wait_s": report.longest_wait_s,
        "left": report.left,
        "handles": {"before": dict(report.before.handles), "after": dict(report.after.handles)},
    }
