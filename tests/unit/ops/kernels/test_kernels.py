"""The kernels agree with each other, and the bench runs over a tiny layer. How fast a GPU is cannot be tested here."""

from __future__ import annotations

import json
import pathlib

import pytest
import torch

from octet.errors import ConfigError
from ops.bench.kernels.command import bench_kernels
from ops.bench.kernels.device import DeviceRates
from ops.bench.kernels.layer import TINY, by_grouped_mm, random_experts, random_tokens, served
from ops.bench.kernels.measure import expert_kernels

CPU = torch.device("cpu")


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_grouped_mm_computes_what_a_shard_serves(num_tokens: int) -> None:
    weights = random_experts(TINY, torch.float32, CPU)
    tokens = random_tokens(TINY, num_tokens, torch.float32, CPU)
    torch.testing.assert_close(by_grouped_mm(tokens, weights), served(tokens, weights), rtol=1e-4, atol=1e-4)


def test_a_share_is_of_the_work_that_must_be_done() -> None:
    rates = DeviceRates(bytes_per_s=1e9, flops_per_s=1e9)
    for kernel in expert_kernels(TINY, rates, (64,), 1, torch.float32, CPU):
        # 64 tokens ask for all 16 experts, or nearly, of 3 · 64 · 32 numbers.
        assert kernel.bandwidth_share == pytest.approx(16 * 24_576 / kernel.seconds / 1e9, rel=0.2)
        assert kernel.matmul_share == pytest.approx(64 * 4 * 2 * 6_144 / kernel.seconds / 1e9)


def test_the_bench_says_that_a_cpu_measures_nothing(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "kernels.json"
    bench_kernels("cpu", None, file)
    assert "nothing was measured" in capsys.readouterr().out
    report = json.loads(file.read_text())
    names = {kernel["name"] for kernel in report["kernels"]}
    assert names == {
        "experts, as served",
        "experts, grouped_mm",
        "attention, decode",
        "dispatch + combine, 2 shards",
    }
    assert all(kernel["seconds"] > 0 for kernel in report["kernels"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="or cpu"):
        bench_kernels("cuda", None, None)
