"""`octet bench breakdown` end to end on members of its own, `peers` and `interference` on a cluster that runs."""

from __future__ import annotations

import json
import pathlib

import pytest

from cluster.launch import RunningCluster
from cluster.planning import EMBEDDED_MODEL
from ops.bench.breakdown.calibration import BreakdownOptions
from ops.bench.breakdown.command import bench_breakdown
from ops.bench.breakdown.report import GROUPS
from ops.bench.interference.command import InterferenceOptions, bench_interference
from ops.bench.peers.command import PeersOptions, bench_peers


@pytest.mark.long
def test_a_breakdown_adds_up_and_tells_what_a_step_costs(tmp_path: pathlib.Path) -> None:
    options = BreakdownOptions(
        streams=(1, 4), prompt_tokens=40, long_prompt_tokens=300, new_tokens=12, rounds=2, shards=2
    )
    file = tmp_path / "breakdown.json"
    bench_breakdown(EMBEDDED_MODEL, options, file)
    report = json.loads(file.read_text())
    assert report["schema"] == "octet.breakdown/1"
    assert [case["sequences"] for case in report["decode"]] == [1, 4]
    for case in report["decode"]:
        assert sum(case["parts_s"].values()) == pytest.approx(case["step_s"])
        # What a layer computes before its experts is one compiled call, which is not taken apart; so are gate and plan.
        assert all(case["parts_s"][part] > 0 for part in ("attention_half", "gate", "pack", "sample"))
        assert case["parts_s"].keys() <= {part for parts in GROUPS.values() for part in parts}
        assert 0 < case["floor_s"]["step"] < case["step_s"]
        assert 0 < case["other_share"] < 1
    costs = report["costs"]
    assert costs["expert"]["fixed_s"] + costs["expert"]["per_expert_s"] + costs["expert"]["per_pair_s"] > 0
    assert costs["attention"]["fixed_s"] > 0
    assert costs["exchange"]["fixed_s"] > 0
    # So small a model's tokens cost so little that what is measured may be put down to what they attend to.
    assert sum(costs["prefill"].values()) > 0


def test_the_cluster_and_the_one_process_engine_are_compared(embedded: RunningCluster, tmp_path: pathlib.Path) -> None:
    options = PeersOptions(
        peers=("local",),
        streams=(2,),
        prompt_tokens=20,
        new_tokens=6,
        rounds=1,
        threads=1,
        address=embedded.address,
        env_dir=tmp_path,
    )
    file = tmp_path / "peers.json"
    bench_peers(EMBEDDED_MODEL, options, file)
    report = json.loads(file.read_text())
    results = {(result["contestant"], result["streams"]): result for result in report["results"]}
    assert set(results) == {("octet", 2), ("octet-whole", 2), ("local", 2)}
    for result in results.values():
        assert all(trial["first_s"] > 0 and trial["all_s"] > 0 for trial in result["trials"])
    assert all(results["local", 2]["ratios"][ours]["whole"]["median"] > 0 for ours in ("octet", "octet-whole"))


def test_interference_is_measured_(embedded: RunningCluster, tmp_path: pathlib.Path) -> None:
    options = InterferenceOptions(
        address=embedded.address,
        streams=2,
        prompt_tokens=20,
        new_tokens=60,
        long_prompts=2,
        long_tokens=600,
        every_s=0.05,
        rounds=1,
        threads=1,
        env_dir=tmp_path,
    )
    file = tmp_path / "interference.json"
    bench_interference(EMBEDDED_MODEL, options, file)
    results = json.loads(file.read_text())["results"]
    assert set(results) == {"octet"}
    for result in results.values():
        assert result["quiet"]["gaps"] > 10
        assert result["disturbed"]["gaps"] > 0
        assert result["long_ttft_s"] > 0
