"""Replies of Ray's own that are lost."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import tempfile

import pytest

from tests.chaos.alone import BIN, nothing_left

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
_MOST_STARTS = 6
"""A reply that is lost while the cluster starts fails the start, and leaves nothing."""

_SCHEDULE = """
duration_s: 10
events:
  - {at_s: 0.5, do: scale, pool: decode, by: 1}
  - {at_s: 3.0, do: kill, target: experts}
  - {at_s: 6.0, do: kill, target: decode}
"""


def _lost(request: int, reply: int, in_flight: int, most: int) -> dict[str, int]:
    """In percent of one method's calls: the request is dropped, or its reply, or it is called lost and carried out.

    Args:
        most: failures in each process.
    """
    return {
        "num_failures": most,
        "req_failure_prob": request,
        "resp_failure_prob": reply,
        "in_flight_failure_prob": in_flight,
    }


ACTOR_CALLS = {"CoreWorkerService.grpc_client.PushTask": _lost(0, 1, 0, 20)}
"""Every call of an actor: Octet's whole control path."""


def _num_lost(directory: pathlib.Path) -> int:
    """What the processes of Ray say that they have lost."""
    texts = (path.read_text(errors="replace") for path in directory.rglob("*") if path.suffix in (".log", ".out"))
    return sum(text.count("Inject RPC") for text in texts)


@pytest.mark.parametrize("failures", [ACTOR_CALLS], ids=["calls of actors"])
def test_replies_of_rays_own_that_are_lost_change_nothing(
    tmp_path: pathlib.Path, checkpoint: pathlib.Path, failures: dict[str, dict[str, int]]
) -> None:
    schedule, report = tmp_path / "schedule.yaml", tmp_path / "report.json"
    schedule.write_text(_SCHEDULE)
    command = [str(BIN / "octet"), "chaos", "run", "--settle", "--users", "3", "--new-tokens", "32"]
    command += ["--schedule", str(schedule), "--json", str(report), str(checkpoint)]
    for start in range(_MOST_STARTS):
        # The paths of Ray's sockets have a limit.
        with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory, nothing_left() as marked:
            failing = {"RAY_testing_rpc_failure": json.dumps(failures), "RAY_TMPDIR": directory}
            done = subprocess.run(
                command, env={**os.environ, **marked, **failing}, capture_output=True, text=True, timeout=200
            )
            lost = _num_lost(pathlib.Path(directory))
        if "Traceback" not in done.stderr and report.exists():
            break
        print(f"start {start} failed:\n{done.stderr[-600:]}")
    print(done.stdout)
    assert report.exists(), done.stderr
    assert done.returncode == 0
    assert lost > 0, "Ray has lost nothing"
    (verdict,) = json.loads(report.read_text())["runs"]
    assert verdict["violations"] == []
    assert sum(fault["fired"] for fault in verdict["faults"]) >= 2, verdict["faults"]
