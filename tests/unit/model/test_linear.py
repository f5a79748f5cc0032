"""Matrices in panels compute what torch's operators compute."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from model import threads
from model.linear import MlpWeights, PackedMatrix, Packer, linear, swiglu


def packed(weight_CH: torch.Tensor) -> PackedMatrix:
    packer = Packer()
    matrix, rows = packer.matrix(*weight_CH.shape)
    rows.copy_(weight_CH)
    packer.pack()
    return matrix


@pytest.mark.parametrize("num_rows", [*range(1, 14), 192, 193, 400])
@pytest.mark.parametrize("biased", [False, True])
def test_a_packed_matrix_multiplies(num_rows: int, biased: bool) -> None:
    columns, depth = random.randrange(1, 70), random.choice([3, 64, 511, 513, 1100])
    weight, bias = torch.randn(columns, depth), torch.randn(columns) if biased else None
    x_TH = torch.randn(num_rows, depth)
    expected = F.linear(x_TH.double(), weight.double(), bias.double() if bias is not None else None).float()
    torch.testing.assert_close(linear(x_TH, packed(weight), bias), expected, rtol=1e-4, atol=1e-5 * depth)


def test_a_row_does_not_depend_on_the_others() -> None:
    weight = packed(torch.randn(random.randrange(1, 70), 530))
    x_TH = torch.randn(23, 530)
    together = linear(x_TH, weight)
    assert all(linear(x_TH[row : row + 1], weight).equal(together[row : row + 1]) for row in range(23))


def test_rows_of_a_packed_matrix_are_those_that_were_packed() -> None:
    weight = torch.randn(37, 9)
    indices = torch.randint(37, (20,))
    assert packed(weight).rows(indices).equal(weight[indices])


@pytest.fixture(params=[1, 3])
def some_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(threads, "_PART_OPERATIONS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("num_rows", [1, 7, 300])
@pytest.mark.usefixtures("some_threads")
def test_a_packed_swiglu_equals_the_operators(num_rows: int) -> None:
    hidden, intermediate = random.randrange(1, 60), random.randrange(1, 60)
    gate, up, down = (
        torch.randn(intermediate, hidden),
        torch.randn(intermediate, hidden),
        torch.randn(hidden, intermediate),
    )
    packer = Packer()
    gate_up, halves = packer.pair(intermediate, hidden)
    for half, source in zip(halves, (gate, up), strict=True):
        half.copy_(source)
    packer.pack()
    x_TH = torch.randn(num_rows, hidden)
    plain = swiglu(x_TH, MlpWeights(gate_up=torch.cat((gate, up)), down=down))
    found = swiglu(x_TH, MlpWeights(gate_up=gate_up, down=packed(down)))
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max() + 1))


def test_the_activation_keeps_its_limits_far_from_zero() -> None:
    """`silu` is 0 on one side and its argument on the other, also where the exponential is no fp32 number any more."""
    intermediate = random.randrange(1, 60)
    gates = torch.tensor([88.0, 89.0, 100.0, 200.0, 1000.0, 1e5])
    x_T1 = torch.cat((gates, -gates)).unsqueeze(1)
    packer = Packer()
    gate_up, halves = packer.pair(intermediate, 1)
    for half in halves:
        half.fill_(1)
    packer.pack()
    found = swiglu(x_T1, MlpWeights(gate_up=gate_up, down=packed(torch.ones(1, intermediate))))
    expected = intermediate * F.silu(x_T1.double()) * x_T1
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-20)


@pytest.mark.usefixtures("some_threads")
def test_columns_are_computed_once_whatever_the_threads() -> None:
    weight, bias, x_TH = torch.randn(random.randrange(1, 200), 70), torch.randn(200), torch.randn(9, 70)
    found = linear(x_TH, packed(weight), bias[: len(weight)])
    torch.testing.assert_close(found, F.linear(x_TH, weight, bias[: len(weight)]), rtol=1e-4, atol=1e-4)
