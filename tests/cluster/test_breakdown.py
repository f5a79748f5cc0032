"""`octet bench breakdown` end to end, on processes of its own."""

from __future__ import annotations

import json
import pathlib

import pytest

from cluster.planning import EMBEDDED_MODEL
from ops.bench.breakdown.analysis import GEMM_PARTS
from ops.bench.breakdown.command import BreakdownOptions, bench_breakdown
from ops.bench.breakdown.report import GROUPS


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
        assert all(case["parts_s"][part] > 0 for part in ("attention", "plan", "pack", "sample", *GEMM_PARTS))
        assert case["parts_s"].keys() <= {part for parts in GROUPS.values() for part in parts}
        assert 0 < case["floor_s"]["step"] < case["step_s"]
        assert 0 < case["other_share"] < 1
    costs = report["costs"]
    assert costs["expert"]["fixed_s"] + costs["expert"]["per_expert_s"] + costs["expert"]["per_pair_s"] > 0
    assert costs["attention"]["fixed_s"] > 0
    assert costs["exchange"]["fixed_s"] > 0
    assert costs["prefill"]["per_token_s"] > 0
