"""`octet bench changes` end to end, on clusters of its own."""

from __future__ import annotations

import json
import pathlib

from ops.bench.changes.command import ChangesOptions, bench_changes, bench_random_changes


def test_each_change_is_measured_beside_quiet_and_fails_no_request(ray_session: None, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "changes.json"
    kinds = ("decode+1", "kill-shard", "kill-router")
    options = ChangesOptions(kinds=kinds, streams=2, prompts=2, prompt_tokens=12, new_tokens=40, repeats=1)
    assert bench_changes(None, options, file) == 0
    results = json.loads(file.read_text())["results"]
    assert set(results) == set(kinds)
    for result in results.values():
        (trial,) = result["trials"]
        assert trial["duration_s"] > 0
        assert 0 < trial["quiet"]["gap_s"] < 60
        assert result["outcomes"]["answers"] > 0
    (loss,) = results["kill-shard"]["trials"]
    # Streams stand still until the cluster goes on without the shard.
    assert 0 < loss["recovered_s"] < loss["duration_s"]
    assert loss["during"]["gap_s"] > loss["quiet"]["gap_s"]


def test_random_changes_leave_nothing_behind(ray_session: None, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "random.json"
    options = ChangesOptions(kinds=(), streams=2, prompts=2, prompt_tokens=12, new_tokens=40)
    assert bench_random_changes(None, options, 4, 7, file) == 0
    report = json.loads(file.read_text())
    # The drawn ones, and back to the sizes of the three pools.
    assert len(report["events"]) == 7
    assert report["left"] == []
    assert report["outcomes"]["problems"] == []
    assert "Controller" in report["handles"]["before"]
