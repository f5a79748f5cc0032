"""`octet bench changes --random` and `octet bench degraded` end to end, each on a cluster of its own."""

from __future__ import annotations

import json
import pathlib

import pytest

from ops.bench.changes.command import ChangesOptions, bench_random_changes
from ops.bench.changes.degraded import bench_degraded


@pytest.mark.long
def test_random_changes_leave_nothing_behind(ray_session: None, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "random.json"
    options = ChangesOptions(kinds=(), streams=2, prompts=2, prompt_tokens=12, new_tokens=40)
    assert bench_random_changes(None, options, 1, 7, file) == 0
    report = json.loads(file.read_text())
    # The drawn one, and back to the sizes of the three pools.
    assert len(report["events"]) == 4
    assert report["left"] == []
    assert report["outcomes"]["problems"] == []
    assert "Controller" in report["handles"]["before"]


@pytest.mark.long
def test_throughput_is_measured_with_a_shard_less(
    ray_session: None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "degraded.json"
    options = ChangesOptions(kinds=(), streams=2, prompts=2, prompt_tokens=12, new_tokens=40, repeats=1)
    assert bench_degraded(None, options, 2, 1.0, file) == 0
    (only,) = json.loads(file.read_text())["rounds"]
    assert only["whole_per_s"] > 0
    assert only["degraded_per_s"] > 0
    assert "goal at least 0.45" in capsys.readouterr().out
