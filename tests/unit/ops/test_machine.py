"""What the machine reaches is what the fastest way reaches."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from ops.bench import machine

SLOW_S = 0.2


def slow(x_TH: torch.Tensor) -> torch.Tensor:
    time.sleep(SLOW_S)
    return x_TH


def fast(x_TH: torch.Tensor) -> torch.Tensor:
    return x_TH


def test_all_ways_compute_one_product() -> None:
    x_TH, weight_CH = torch.randn(7, 40), torch.randn(50, 40)
    for product in machine.products(weight_CH):
        torch.testing.assert_close(product(x_TH), x_TH @ weight_CH.T)


@pytest.mark.parametrize("ways", [(slow, fast), (fast, slow)])
def test_the_faster_way_to_multiply_counts(
    monkeypatch: pytest.MonkeyPatch, ways: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
) -> None:
    monkeypatch.setattr(machine, "_STREAM_BYTES", 2**20)
    monkeypatch.setattr(machine, "_MATMUL_SIZE", 64)
    monkeypatch.setattr(machine, "_REPEATS", 1)
    monkeypatch.setattr(machine, "products", lambda weight_CH: ways)
    assert machine.cpu_rates(1).flops_per_s > 2 * 64**3 / SLOW_S
