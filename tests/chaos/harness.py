"""`octet chaos run` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ops.chaos.schedule import Schedule, dump_schedule

_END_S = 60.0
"""A cluster takes some seconds to end."""


def run(
    directory: pathlib.Path, schedules: Sequence[Schedule], *options: str, env: Mapping[str, str], timeout_s: float
) -> dict[str, Any]:
    """Returns: its report, in which every promise was kept."""
    report = directory / "report.json"
    command = [sys.executable, "-m", "ops.cli", "chaos", "run", "--json", str(report), *options]
    for schedule in schedules:
        file = directory / f"{schedule.name}.json"
        file.write_text(dump_schedule(schedule))
        command += ["--schedule", str(file)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        # Ctrl-C is for whoever runs the tests, who tells it.
        process_group=0,
    ) as process:
        said, errors = _ended(process, timeout_s)
    print(said)
    assert report.exists(), errors
    told: dict[str, Any] = json.loads(report.read_text())
    assert [one["violations"] for one in told["runs"]] == [[]] * len(schedules), said
    assert process.returncode == 0
    return told


def _ended(process: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """What it said. Where it is not waited for to its end it is interrupted first, so that it can end what it started:
    a Ray on hosts of its own would stay. Raises: TimeoutExpired."""
    try:
        return process.communicate(timeout=timeout_s)
    except BaseException:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_END_S)
        process.kill()
        raise
