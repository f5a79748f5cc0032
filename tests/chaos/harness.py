"""`octet chaos run` in a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ops.chaos.schedule import Schedule, dump_schedule


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
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **env}
    )
    print(done.stdout)
    assert report.exists(), done.stderr
    told: dict[str, Any] = json.loads(report.read_text())
    assert [one["violations"] for one in told["runs"]] == [[]] * len(schedules), done.stdout
    assert done.returncode == 0
    return told
