"""`octet bench changes`: the longest gap in any stream while the cluster is changed, against quiet, in one run."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

from rich.console import Console

from cluster.launch import RunningCluster, launch
from cluster.planning import EMBEDDED_MODEL
from model.config import read_config
from octet.client import AsyncClient, CallError
from octet.config import load_config
from octet.errors import UnavailableError
from ops.bench.changes import random_events
from ops.bench.changes.gaps import Window, Windows, look, outcomes
from ops.bench.changes.kinds import KINDS, SHORT_WINDOW, Kind, Layout, overrides
from ops.bench.changes.leftovers import leftovers_once_settled, take_stock
from ops.bench.changes.others import Others
from ops.bench.changes.random_events import RandomReport
from ops.bench.changes.report import Result, as_json, print_results
from ops.bench.changes.stage import Stage
from ops.bench.changes.streams import Streams, quiet_answers
from ops.bench.machine import describe

_TIMEOUT_S = 120.0
_PAGE_SIZE = 16
_WIDTH = 210
"""Of the table, also where output goes to a file."""
_WARM_UP_S, _BEFORE_S, _LEAST_S, _TAIL_S, _PAUSE_S = 3.0, 3.0, 1.0, 0.25, 1.0
"""A window of change begins with its cause, ends a tail after its effect, and lasts at least `_LEAST_S`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChangesOptions:
    kinds: tuple[str, ...]
    streams: int = 8
    prompts: int = 16
    prompt_tokens: int = 48
    new_tokens: int = 128
    repeats: int = 5


def bench_changes(model_dir: pathlib.Path | None, options: ChangesOptions, json_file: pathlib.Path | None) -> int:
    """Print what each kind of change does to running streams, and its goal.

    Returns: 0, or 1 if a request or a change failed.
    Raises: ConfigError, OctetError.
    """
    model_dir = EMBEDDED_MODEL if model_dir is None else model_dir
    machine, console = describe(), Console(highlight=False, width=_WIDTH)
    layouts: dict[Layout, list[str]] = {}
    for name in options.kinds:
        layouts.setdefault(KINDS[name].layout, []).append(name)
    results: dict[str, Result] = {}
    num_experts = read_config(model_dir).n_routed_experts
    with console.status("") as status:
        for layout, names in layouts.items():
            status.update(f"starting a cluster: {layout}")
            with own_cluster(model_dir, options, overrides(layout, num_experts)) as cluster:
                results |= asyncio.run(_run(cluster, options, names, status.update))
    print_results(machine, results, options.streams, console)
    if json_file is not None:
        report = as_json(machine, results) | {"load": dataclasses.asdict(options)}
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(result.well for result in results.values()) else 1


def bench_random_changes(
    model_dir: pathlib.Path | None, options: ChangesOptions, count: int, seed: int, json_file: pathlib.Path | None
) -> int:
    """Print what became of so many random changes of size, and what is left behind.

    Returns: 0 if all is well, else 1.
    Raises: ConfigError, OctetError.
    """
    model_dir = EMBEDDED_MODEL if model_dir is None else model_dir
    machine, console = describe(), Console(highlight=False, width=_WIDTH)
    with console.status("starting a cluster") as status, own_cluster(model_dir, options, SHORT_WINDOW) as cluster:
        report = asyncio.run(_run_random(cluster, options, count, seed, status.update))
    random_events.print_report(machine, report, seed, console)
    if json_file is not None:
        json_file.write_text(json.dumps(random_events.as_json(machine, report, seed), indent=2) + "\n")
    return 0 if report.well else 1


@contextlib.contextmanager
def own_cluster(model_dir: pathlib.Path, options: ChangesOptions, fields: Sequence[str]) -> Iterator[RunningCluster]:
    """Pages are enough for every stream on any one worker."""
    pages = 2 * options.streams * -(-(options.prompt_tokens + options.new_tokens) // _PAGE_SIZE)
    own = (
        f"ray.namespace=octet-{uuid.uuid4().hex[:8]}",
        "frontend.port=0",
        f"kv.page_size={_PAGE_SIZE}",
        f"kv.prefill_pages={pages}",
        f"kv.decode_pages={pages}",
    )
    cluster = launch(load_config(overrides=[*own, *fields], values={"model.path": str(model_dir)}))
    try:
        yield cluster
    finally:
        cluster.stop(drain=False)


@contextlib.asynccontextmanager
async def under_load(cluster: RunningCluster, options: ChangesOptions) -> AsyncIterator[tuple[Stage, Streams]]:
    """Streams run, and have been warmed up."""
    async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
        vocab_size = (await client.model_info()).vocab_size
        expected = await quiet_answers(client, vocab_size, options.prompts, options.prompt_tokens, options.new_tokens)
        sizes = {pool.name: len(pool.members) for pool in (await client.status()).pools}
        async with Streams(client, expected, options.streams) as streams:
            await asyncio.sleep(_WARM_UP_S)
            yield Stage(cluster, client, sizes), streams


async def _run(
    cluster: RunningCluster, options: ChangesOptions, names: Sequence[str], say: Callable[[str], None]
) -> dict[str, Result]:
    windows: dict[str, list[Windows]] = {name: [] for name in names}
    refused: dict[str, list[str]] = {name: [] for name in names}
    async with under_load(cluster, options) as (stage, streams):
        for number in range(options.repeats):
            for name in names:
                say(f"{name}, {number + 1} of {options.repeats}")
                try:
                    windows[name].append(await _windows(stage, KINDS[name]))
                except (CallError, UnavailableError) as error:
                    refused[name].append(str(error))
    return {
        name: Result(
            trials=tuple(w.trial(streams.answers) for w in of_kind),
            refused=tuple(refused[name]),
            outcomes=outcomes(streams.answers, [w.during for w in of_kind]),
        )
        for name, of_kind in windows.items()
    }


async def _run_random(
    cluster: RunningCluster, options: ChangesOptions, count: int, seed: int, say: Callable[[str], None]
) -> RandomReport:
    async with AsyncClient(cluster.address, timeout_s=_TIMEOUT_S) as client:
        async with under_load(cluster, options) as (stage, streams):
            before, begin_s = await take_stock(stage), time.monotonic()
            events = await random_events.play(stage, count, seed, say)
        # Streams have ended, and their client's connection with them.
        left, after = await leftovers_once_settled(Stage(cluster, client, stage.sizes), before)
    whole = Window(begin_s, time.monotonic())
    seen = look(streams.answers, whole)
    return RandomReport(
        events=events,
        outcomes=outcomes(streams.answers, [whole]),
        longest_gap_s=seen.gap_s,
        longest_wait_s=seen.wait_s,
        left=left,
        before=before,
        after=after,
    )


async def _windows(stage: Stage, kind: Kind) -> Windows:
    await kind.prepare(stage)
    await asyncio.sleep(_PAUSE_S)
    own = await stage.sessions()
    quiet_s = time.monotonic()
    await asyncio.sleep(_BEFORE_S)
    others = Others(own)
    begin_s = time.monotonic()
    recovered_s = await kind.act(stage)
    done_s = time.monotonic()
    during = Window(begin_s, max(done_s + _TAIL_S, begin_s + _LEAST_S))
    await asyncio.sleep(during.end_s - done_s)
    others_s, noted_s = others.taken_s(), time.monotonic() - begin_s
    await asyncio.sleep(_PAUSE_S)
    others = Others(own)
    after_s = time.monotonic()
    await asyncio.sleep(during.length_s)
    quiet = Window(after_s, time.monotonic())
    return Windows(
        before=Window(quiet_s, begin_s),
        during=during,
        quiet=quiet,
        duration_s=done_s - begin_s,
        recovered_s=recovered_s,
        others=others_s / noted_s,
        quiet_others=others.taken_s() / quiet.length_s,
    )
