"""The start of a cluster on a terminal: the phase, and a bar per member while weights are read."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import TaskID as RichTask

from cluster.control.start_progress import StartProgress


class StartDisplay:
    """Live bars on a terminal; one line per phase and member where there is none, as in a log."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[tensors]}"),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, RichTask] = {}
        self._said: set[str] = set()

    def __enter__(self) -> StartDisplay:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bars.stop()

    def show(self, progress: StartProgress) -> None:
        self._say(progress.phase)
        for name, loading in progress.loading.items():
            tensors = f"{loading.tensors_done}/{loading.tensors_total} tensors"
            if not self._live:
                step = f"{name}: {tensors}"
                if step in self._said or not loading.tensors_done:
                    continue
                self._said.add(step)
                eta = "" if loading.eta_s is None else f", {loading.eta_s:.0f} s to go"
                mib, rate = loading.bytes_done / 2**20, loading.rate_bytes_s / 2**20
                self._say(f"{step}, {mib:.1f} MiB, {rate:.1f} MiB/s{eta}")
                continue
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, tensors=tensors)
            self._bars.update(
                self._tasks[name], completed=loading.bytes_done, total=loading.bytes_total or None, tensors=tensors
            )

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._console.print(f"octet: {line}", highlight=False)
