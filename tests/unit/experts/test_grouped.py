from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from experts.grouped import count_slots, grouped_swiglu

pytestmark = pytest.mark.usefixtures("fresh_seed")

HIDDEN_SIZE, INTERMEDIATE_SIZE = 12, 10


def random_weights(num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    gate_up = torch.randn(num_slots, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE) * 0.4
    return gate_up, torch.randn(num_slots, HIDDEN_SIZE, INTERMEDIATE_SIZE) * 0.4


def random_slots(num_rows: int, per_row: int, num_slots: int) -> torch.Tensor:
    """Different slots in a row; about half of them elsewhere."""
    slots_UK = torch.stack([torch.randperm(num_slots)[:per_row] for _ in range(num_rows)])
    return slots_UK.masked_fill(torch.rand(num_rows, per_row) < 0.5, -1).int()


def looped(
    x_UH: torch.Tensor, slots_UK: torch.Tensor, weights_UK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    y_UH = torch.zeros_like(x_UH)
    for row, (slots, weights) in enumerate(zip(slots_UK.tolist(), weights_UK.tolist(), strict=True)):
        for slot, weight in zip(slots, weights, strict=True):
            if slot >= 0:
                gate, up = (gate_up[slot] @ x_UH[row]).chunk(2)
                y_UH[row] += weight * (down[slot] @ (F.silu(gate) * up))
    return y_UH


@pytest.mark.parametrize("num_rows", [1, 2, 40])
def test_rows_get_the_weighted_sum_of_their_experts(num_rows: int) -> None:
    gate_up, down = random_weights(6)
    x_UH, slots_UK, weights_UK = (
        torch.randn(num_rows, HIDDEN_SIZE),
        random_slots(num_rows, 4, 6),
        torch.rand(num_rows, 4),
    )
    found = grouped_swiglu(x_UH, slots_UK, weights_UK, gate_up, down, count_slots(slots_UK, 6))
    torch.testing.assert_close(found, looped(x_UH, slots_UK, weights_UK, gate_up, down), rtol=1e-4, atol=1e-5)


def test_a_row_whose_experts_are_all_elsewhere_is_zero() -> None:
    gate_up, down = random_weights(3)
    slots_UK = torch.tensor([[-1, -1], [0, 2]], dtype=torch.int32)
    y_UH = grouped_swiglu(
        torch.randn(2, HIDDEN_SIZE), slots_UK, torch.ones(2, 2), gate_up, down, count_slots(slots_UK, 3)
    )
    assert not y_UH[0].any()
    assert y_UH[1].any()


def test_weights_of_slots_that_nobody_asks_for_are_not_touched() -> None:
    """They may never have been loaded."""
    gate_up, down = random_weights(3)
    gate_up[1] = down[1] = torch.nan
    slots_UK = torch.tensor([[0, 2], [2, -1]], dtype=torch.int32)
    y_UH = grouped_swiglu(
        torch.randn(2, HIDDEN_SIZE), slots_UK, torch.ones(2, 2), gate_up, down, count_slots(slots_UK, 3)
    )
    assert y_UH.isfinite().all()


def test_sums_of_bf16_rows_are_fp32() -> None:
    gate_up, down = (weights.bfloat16() for weights in random_weights(3))
    slots_UK = torch.zeros(4, 1, dtype=torch.int32)
    x_UH = torch.randn(4, HIDDEN_SIZE).bfloat16()
    y_UH = grouped_swiglu(x_UH, slots_UK, torch.rand(4, 1), gate_up, down, count_slots(slots_UK, 3))
    assert y_UH.dtype == torch.float32


@given(st.lists(st.lists(st.integers(-1, 4), min_size=3, max_size=3), max_size=20))
def test_slots_are_counted_and_those_elsewhere_are_not(rows: list[list[int]]) -> None:
    slots_UK = torch.tensor(rows, dtype=torch.int32).view(-1, 3)
    flat = [slot for row in rows for slot in row]
    assert count_slots(slots_UK, 5).tolist() == [flat.count(slot) for slot in range(5)]


def test_a_slot_far_beyond_the_last_makes_no_room_for_those_between() -> None:
    slots_UK = torch.tensor([[0, 2**31 - 1], [-(2**31), 5]], dtype=torch.int32)
    assert count_slots(slots_UK, 3).tolist() == [1, 0, 0, 2]
