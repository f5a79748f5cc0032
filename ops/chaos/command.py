"""`octet chaos run`: faults on purpose, and whether every promise was kept."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

from rich.console import Console

from cluster.launch import RunningCluster, attach
from octet.client import AsyncClient
from octet.errors import CheckpointError, ConfigError, OctetError
from ops.bench.machine import describe
from ops.chaos.drawing import draw_schedule
from ops.chaos.history import Question
from ops.chaos.own import own_cluster
from ops.chaos.questions import Asked, make_questions
from ops.chaos.ray_replies import failures
from ops.chaos.report import as_json, print_figures, print_verdict
from ops.chaos.rig import Rig, check_events, rigged
from ops.chaos.run import Load, Verdict, run_schedule
from ops.chaos.schedule import Schedule, load_schedule
from ops.chaos.stage import Stage
from ops.chaos.timeline import timeline
from ops.progress import StartDisplay

_TIMEOUT_S = 120.0
_STARTS = 6
"""Of a cluster whose Ray loses replies."""
_WIDTH = 160


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """A cluster that is not the harness's own. Its processes are killed as well."""

    ray_address: str
    namespace: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChaosOptions:
    schedules: tuple[Schedule, ...]
    load: Load = dataclasses.field(default_factory=Load)
    asked: Asked = dataclasses.field(default_factory=Asked)
    overrides: tuple[str, ...] = ()
    """Of the own cluster's configuration."""
    against: Against | None = None
    num_hosts: int = 1
    """Let the own cluster be on two hosts, in network namespaces."""
    lost_replies: float = 0.0
    """What share of the replies to calls of actors the own cluster's Ray loses."""
    lost_control: float = 0.0
    """What share of its calls to the GCS and to raylets it loses, in each of three ways."""
    each_complete: bool = False
    """Replace what was lost before the next schedule begins, and not only before the end."""

    @property
    def failing(self) -> Mapping[str, Mapping[str, int]]:
        """Calls of Ray's own that it fails."""
        return failures(self.lost_replies, self.lost_control)

    def check(self) -> None:
        """Raises: ConfigError where they contradict each other."""
        if self.num_hosts > 1 and self.against is not None:
            raise ConfigError("chaos run", "--hosts and --against", "one of them: hosts are a cluster's of its own")
        if self.lost_replies and self.against is not None:
            raise ConfigError("chaos run", "--lose-ray-replies and --against", "one of them: it is a Ray's of its own")
        if self.lost_control and self.against is not None:
            raise ConfigError("chaos run", "--lose-ray-control and --against", "one of them: it is a Ray's of its own")
        if self.overrides and self.against is not None:
            raise ConfigError("chaos run", "--set and --against", "one of them: a cluster that runs has its config")
        check_events(self.schedules, own=self.against is None, hosts=self.num_hosts)


def schedules_of(
    files: Sequence[pathlib.Path], seed: int | None, count: int, duration_s: float
) -> tuple[Schedule, ...]:
    """Those of the files, or else so many drawn from this seed on. Raises: ConfigError."""
    if files and seed is not None:
        raise ConfigError("chaos run", "--schedule and --seed", "one of them")
    if files:
        return tuple(load_schedule(file) for file in files)
    if seed is None:
        raise ConfigError("chaos run", "neither --schedule nor --seed", "one of them")
    return tuple(draw_schedule(number, duration_s) for number in range(seed, seed + count))


def run_chaos(
    model_dir: pathlib.Path | None,
    options: ChaosOptions,
    json_file: pathlib.Path | None = None,
    html_file: pathlib.Path | None = None,
) -> int:
    """Print what happened. Returns: 0 if every promise was kept, else 1. Raises: ConfigError, OctetError."""
    options.check()
    machine, console = describe(), Console(highlight=False, width=_WIDTH)
    with contextlib.ExitStack() as stack:
        rig = stack.enter_context(rigged(options.schedules, options.num_hosts, options.failing))
        cluster = stack.enter_context(_cluster(model_dir, options, rig))
        verdicts = asyncio.run(run_all(cluster, options, lambda verdict: print_verdict(verdict, console), rig))
    print_figures(machine, verdicts, console)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(machine, verdicts), indent=2) + "\n")
    if html_file is not None:
        html_file.write_text(timeline(verdicts))
    return int(any(verdict.violations for verdict in verdicts))


@contextlib.contextmanager
def _cluster(model_dir: pathlib.Path | None, options: ChaosOptions, rig: Rig) -> Iterator[RunningCluster]:
    if (against := options.against) is not None:
        yield attach(against.ray_address, against.namespace)
        return
    with contextlib.ExitStack() as stack:
        console = Console(stderr=True)
        with StartDisplay(console) as display, rig.starting():
            overrides = (*rig.overrides, *options.overrides)
            # A reply that is lost while the cluster starts may fail the start, which leaves nothing.
            for starts_left in reversed(range(_STARTS if options.failing else 1)):
                try:
                    cluster = stack.enter_context(own_cluster(model_dir, overrides, display.show))
                    break
                except OctetError as error:
                    if not starts_left or isinstance(error, ConfigError | CheckpointError):
                        raise
                    console.print(f"started anew: {error}", markup=False)
        yield cluster


@contextlib.asynccontextmanager
async def questioned(
    cluster: RunningCluster, asked: Asked, rig: Rig | None = None
) -> AsyncIterator[tuple[Stage, list[Question]]]:
    """The cluster, and questions whose answers without faults are known."""
    async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
        yield Stage(cluster.plan, cluster.address, client, rig), await make_questions(client, asked)


async def run_all(
    cluster: RunningCluster,
    options: ChaosOptions,
    say: Callable[[Verdict], None] = lambda verdict: None,
    rig: Rig | None = None,
) -> list[Verdict]:
    """All schedules on one cluster; after the last one, everything is as it was before the first."""
    verdicts: list[Verdict] = []
    async with questioned(cluster, options.asked, rig) as (stage, questions):
        start = await stage.facts()
        for number, schedule in enumerate(options.schedules):
            last = number == len(options.schedules) - 1
            load = dataclasses.replace(options.load, seed=options.load.seed + number)
            verdict = await run_schedule(
                stage, schedule, questions, load, complete=options.each_complete or last, start=start
            )
            say(verdict)
            verdicts.append(verdict)
    return verdicts
