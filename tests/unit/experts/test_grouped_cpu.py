"""The kernel over panels gives what the loop over experts gives."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import torch

from experts.grouped import count_slots, grouped_cpu, grouped_swiglu
from model.linear import PANEL, Packer


def packed(gate_up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[S, 2I, H]` and `[S, H, I]` in panels."""
    packer, gate_ups, downs = Packer(), [], []
    for gate_up_IH, down_HI in zip(gate_up, down, strict=True):
        pair, halves = packer.pair(len(gate_up_IH) // 2, gate_up_IH.shape[1])
        for half, source in zip(halves, gate_up_IH.chunk(2), strict=True):
            half.copy_(source)
        matrix, rows = packer.matrix(*down_HI.shape)
        rows.copy_(down_HI)
        gate_ups.append(pair.panels)
        downs.append(matrix.panels)
    packer.pack()
    return torch.stack(gate_ups), torch.stack(downs)


def grouped(
    x_UH: torch.Tensor, slots_UK: torch.Tensor, weights_UK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, list[int]]:
    y_UH, counts_S = torch.full_like(x_UH, torch.nan), np.zeros(len(gate_up), np.int64)
    rows, panels = (x_UH, slots_UK, weights_UK), packed(gate_up, down)
    held_and_counts = (np.ones(len(gate_up), bool), counts_S)
    arguments = (*(x.numpy() for x in rows), *held_and_counts, *(x.numpy() for x in panels), y_UH.numpy())
    assert grouped_cpu().serve_rows(*arguments) == np.count_nonzero(counts_S)
    return y_UH, counts_S.tolist()


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 31, 250])
def test_the_kernel_equals_the_loop_over_experts(num_rows: int) -> None:
    num_slots, top_k = random.randrange(4, 20), 4
    hidden, intermediate = random.randrange(4, 80), random.randrange(3, 70)
    x_UH = torch.randn(num_rows, hidden)
    slots_UK = torch.stack([torch.randperm(2 * num_slots)[:top_k] for _ in range(num_rows)])
    slots_UK = torch.where(slots_UK < num_slots, slots_UK, -1).int()
    weights_UK = torch.rand(num_rows, top_k)
    gate_up, down = torch.randn(num_slots, 2 * intermediate, hidden), torch.randn(num_slots, hidden, intermediate)

    found, counts = grouped(x_UH, slots_UK, weights_UK, gate_up, down)

    counts_S = count_slots(slots_UK, num_slots)
    expected = grouped_swiglu(x_UH, slots_UK, weights_UK, gate_up, down, counts_S)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))
    assert counts == counts_S.tolist()


def test_an_expert_of_very_many_rows_is_computed_in_parts() -> None:
    num_rows, hidden, intermediate = random.randrange(400, 600), 24, 20
    x_UH, weights_UK = torch.randn(num_rows, hidden), torch.rand(num_rows, 1)
    slots_UK = torch.zeros(num_rows, 1, dtype=torch.int32)
    gate_up, down = torch.randn(1, 2 * intermediate, hidden), torch.randn(1, hidden, intermediate)
    found, counts = grouped(x_UH, slots_UK, weights_UK, gate_up, down)
    expected = grouped_swiglu(x_UH, slots_UK, weights_UK, gate_up, down, count_slots(slots_UK, 1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert counts == [num_rows]


def test_what_is_computed_apart_adds_up_to_the_same_bits() -> None:
    """By several callers, each of whom has slots of its own; the first slot's rows are more than one pass takes."""
    num_rows, num_slots, size = random.randrange(400, 600), 5, 24
    x_UH, weights_UK = torch.randn(num_rows, size), torch.rand(num_rows, 3)
    slots_UK = torch.stack([torch.tensor([0, *(1 + torch.randperm(4)[:2])]) for _ in range(num_rows)]).int()
    gate_up, down = torch.randn(num_slots, 2 * size, size), torch.randn(num_slots, size, size)
    expected, counts = grouped(x_UH, slots_UK, weights_UK, gate_up, down)

    arguments = [part.numpy() for part in (x_UH, slots_UK, weights_UK, *packed(gate_up, down))]
    begins, cut = np.cumsum([0, *counts]), random.randrange(1, num_slots)
    out, y_UH = np.full((begins[-1], size), np.nan, np.float32), torch.zeros_like(x_UH)
    for first, last in ((cut, num_slots), (0, cut)):
        grouped_cpu().each_swiglu(*arguments, first, last, out[begins[first] : begins[last]])
    grouped_cpu().add_each(out, arguments[1], arguments[2], num_slots, y_UH.numpy())
    assert y_UH.equal(expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    hidden, intermediate = 40, 24
    gate_up, down = torch.randn(3, 2 * intermediate, hidden), torch.randn(3, hidden, intermediate)
    x_UH, weights_UK = torch.randn(17, hidden), torch.rand(17, 2)
    slots_UK = torch.stack([torch.randperm(3)[:2] for _ in range(17)]).int()
    together, _ = grouped(x_UH, slots_UK, weights_UK, gate_up, down)
    for row in range(17):
        one = slice(row, row + 1)
        alone, _ = grouped(
            x_UH[one].contiguous(), slots_UK[one].contiguous(), weights_UK[one].contiguous(), gate_up, down
        )
        assert alone.equal(together[one])


def test_not_a_number_is_passed_on() -> None:
    x_UH = torch.tensor([[1.0, float("nan")], [1.0, 1.0]])
    slots_UK, weights_UK = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    y_UH, _ = grouped(x_UH, slots_UK, weights_UK, torch.ones(1, 4, 2), torch.ones(1, 2, 2))
    assert y_UH.isnan().any(dim=1).tolist() == [True, False]


def test_an_array_of_another_layout_is_refused() -> None:
    """Addresses are computed from the first element: a strided array must not slip through."""
    panels = [part.numpy() for part in packed(torch.ones(1, 2 * PANEL, 8), torch.ones(1, 8, PANEL))]
    strided = np.ones((2, 16), np.float32)[:, ::2]
    rows = (strided, np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32))
    with pytest.raises(TypeError, match="No matching definition"):
        grouped_cpu().grouped_swiglu(*rows, *panels, 0, 1, 0, np.zeros(1, np.int64), np.ones((2, 8), np.float32))


def test_what_becomes_due_in_its_midst_ends_it_behind_a_slot() -> None:
    """Set by another thread, as a frame is that comes."""
    num_rows, num_slots, size = 2000, 32, 128
    weights = packed(torch.randn(num_slots, 2 * size, size), torch.randn(num_slots, size, size))
    rows = torch.randn(num_rows, size), torch.randint(num_slots, (num_rows, 4)).int(), torch.rand(num_rows, 4)
    arguments, due = [part.numpy() for part in (*rows, *weights)], np.zeros(1, np.int64)
    expected, y = np.zeros((num_rows, size), np.float32), np.zeros((num_rows, size), np.float32)
    assert grouped_cpu().grouped_swiglu(*arguments, 0, num_slots, 0, due, expected) == num_slots
    for _ in range(200):
        due[0], y[:] = 0, 0
        timer = threading.Timer(0.002, due.fill, (1,))
        timer.start()
        stopped = grouped_cpu().grouped_swiglu(*arguments, 0, num_slots, 0, due, y)
        timer.join()
        if stopped < num_slots:
            break
    assert 0 < stopped < num_slots
    assert grouped_cpu().grouped_swiglu(*arguments, stopped, num_slots, num_rows * 4, due, y) == num_slots
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("most", "ends"), [(0, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5]), (10, [2, 4, 5]), (14, [2, 4, 5])]
)
def test_between_two_pauses_no_more_rows_are_computed_than_may_be(most: int, ends: list[int]) -> None:
    """Five slots of five rows each; a single slot is never cut."""
    weights = packed(torch.randn(5, 2 * 8, 16), torch.randn(5, 16, 8))
    rows = torch.randn(5, 16), torch.stack([torch.randperm(5) for _ in range(5)]).int(), torch.rand(5, 5)
    arguments, due = [part.numpy() for part in (*rows, *weights)], np.ones(1, np.int64)
    found, y = [0], np.zeros((5, 16), np.float32)
    while found[-1] < 5:
        found.append(grouped_cpu().grouped_swiglu(*arguments, found[-1], 5, most, due, y))
    assert found[1:] == ends
