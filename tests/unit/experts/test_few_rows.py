"""The CPU kernel for few rows gives what the loop over experts gives."""

from __future__ import annotations

import random

import pytest
import torch

from experts.grouped import count_slots, cpu_kernel, grouped_swiglu


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 31, 100])
def test_the_kernel_equals_the_loop_over_experts(num_rows: int) -> None:
    num_slots, top_k = random.randrange(4, 20), 4
    hidden, intermediate = 2 * random.randrange(4, 80), random.randrange(3, 70)
    x_UH = torch.randn(num_rows, hidden)
    slots_UK = torch.stack([torch.randperm(2 * num_slots)[:top_k] for _ in range(num_rows)])
    slots_UK = torch.where(slots_UK < num_slots, slots_UK, -1).int()
    weights_UK = torch.rand(num_rows, top_k)
    gate_up, down = torch.randn(num_slots, 2 * intermediate, hidden), torch.randn(num_slots, hidden, intermediate)

    found = cpu_kernel()(x_UH, slots_UK, weights_UK, gate_up, down)

    expected = grouped_swiglu(x_UH, slots_UK, weights_UK, gate_up, down, count_slots(slots_UK, num_slots))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))


def test_not_a_number_is_passed_on() -> None:
    x_UH = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    slots_UK, weights_UK = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    y_UH = cpu_kernel()(x_UH, slots_UK, weights_UK, torch.ones(1, 4, 2), torch.ones(1, 2, 2))
    assert y_UH.isnan().any(dim=1).tolist() == [True, False]
