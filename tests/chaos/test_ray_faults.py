"""Calls of Ray's own of which the request or the reply is lost."""

from __future__ import annotations

import pathlib
import tempfile

import pytest

from ops.chaos.schedule import Kill, Scale, Schedule
from tests.alone import nothing_left
from tests.chaos import harness

pytestmark = [pytest.mark.long, pytest.mark.timeout(400)]
SCHEDULE = Schedule(
    duration_s=10.0,
    events=(
        Scale(at_s=0.5, pool="decode", by=1),
        Kill(at_s=3.0, target="experts"),
        Kill(at_s=6.0, target="decode"),
    ),
)


def _num_lost(directory: pathlib.Path) -> int:
    """What the processes of Ray say that they have lost."""
    texts = (path.read_text(errors="replace") for path in directory.rglob("*") if path.suffix in (".log", ".out"))
    return sum(text.count("Inject RPC") for text in texts)


@pytest.mark.parametrize(
    "lost", [("--lose-ray-replies", "0.01"), ("--lose-ray-control", "0.1")], ids=["actors", "control"]
)
def test_calls_of_rays_own_that_are_lost_change_nothing(
    lost: tuple[str, str], tmp_path: pathlib.Path, checkpoint: pathlib.Path
) -> None:
    options = ("--settle", "--users", "3", "--new-tokens", "32", *lost, str(checkpoint))
    # The paths of Ray's sockets have a limit.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as directory, nothing_left() as marked:
        env = {**marked, "RAY_TMPDIR": directory}
        report = harness.run(tmp_path, [SCHEDULE], *options, env=env, timeout_s=350)
        assert _num_lost(pathlib.Path(directory)) > 0, "Ray has lost nothing"
    (only,) = report["runs"]
    assert sum(fault["fired"] for fault in only["faults"]) >= 2, only["faults"]
