"""What the register tiles' module emits for rows of any length, compared with numpy."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest

from model.rows_cpu import (
    DOTS,
    add_scaled_row,
    copy_row,
    dots,
    exp,
    exponential_columns,
    exponentials,
    largest_of,
    pack_rows,
    rotate,
    scale_row,
    sum_of_squares,
)
from model.vectors_cpu import LANES, address

Array = npt.NDArray[np.float32]
SIZES = [1, 2, 15, 16, 17, 63, 64, 65, 128, 200]
_compiled: Any = numba.njit


@_compiled  # type: ignore[untyped-decorator]
def _exp_of_each(x: Any, out: Any) -> None:
    for i in range(len(x)):
        out[i] = exp(x[i])


@_compiled  # type: ignore[untyped-decorator]
def _exponentials(x: Any, size: Any, shift: Any) -> Any:
    return exponentials(address(x, 0), size, shift)


@_compiled  # type: ignore[untyped-decorator]
def _largest(x: Any, size: Any, least: Any) -> Any:
    return largest_of(address(x, 0), size, least)


@_compiled  # type: ignore[untyped-decorator]
def _sum_of_squares(x: Any, size: Any) -> Any:
    return sum_of_squares(address(x, 0), size)


@_compiled  # type: ignore[untyped-decorator]
def _scale(x: Any, factor: Any, weight: Any, size: Any, out: Any) -> None:
    scale_row(address(x, 0), factor, address(weight, 0), size, address(out, 0))


@_compiled  # type: ignore[untyped-decorator]
def _add_scaled(x: Any, factor: Any, size: Any, out: Any) -> None:
    add_scaled_row(address(x, 0), factor, size, address(out, 0))


@_compiled  # type: ignore[untyped-decorator]
def _copy(x: Any, size: Any, out: Any) -> None:
    copy_row(address(x, 0), size, address(out, 0))


@_compiled  # type: ignore[untyped-decorator]
def _rotate(x: Any, cos: Any, sin: Any, half: Any) -> None:
    rotate(address(x, 0), address(cos, 0), address(sin, 0), half)


@_compiled  # type: ignore[untyped-decorator]
def _dots(x: Any, y: Any, offsets: Any, start: Any, depth: Any, factor: Any, out: Any) -> None:
    dots(address(x, 0), address(y, 0), offsets, start, depth, factor, address(out, 0))


@_compiled  # type: ignore[untyped-decorator]
def _exponential_columns(x: Any, count: Any, state: Any) -> None:
    largest, total, factor = address(state, 0), address(state, LANES), address(state, 2 * LANES)
    exponential_columns(address(x, 0), x.shape[1], count, largest, total, factor)


@_compiled  # type: ignore[untyped-decorator]
def _pack(x: Any, offsets: Any, depth: Any, factor: Any, out: Any) -> None:
    pack_rows(address(x, 0), offsets, depth, factor, address(out, 0))


def numbers(size: int, most: float = 3) -> Array:
    return np.random.default_rng().uniform(-most, most, size).astype(np.float32)


def exp_of_each(x: Array) -> Array:
    out = np.empty_like(x)
    _exp_of_each(x, out)
    return out


def exp_of_row(x: Array) -> Array:
    out = x.copy()
    _exponentials(out, len(out), np.float32(0))
    return out


@pytest.mark.parametrize("exp_of", [exp_of_each, exp_of_row])
def test_the_exponential_is_within_two_ulp_and_keeps_its_limits(exp_of: Any) -> None:
    x = numbers(1000, 87)
    np.testing.assert_allclose(exp_of(x), np.exp(x.astype(np.float64)), rtol=2.5e-7)
    one, least, nothing = exp_of(np.array([0, -np.inf, np.nan], np.float32))
    assert one == 1
    assert least < 1e-37
    assert np.isnan(nothing)


@pytest.mark.parametrize("size", SIZES)
def test_what_lies_behind_a_row_is_neither_changed_nor_counted(size: int) -> None:
    x, weight, behind = numbers(size + 70), numbers(size + 70), np.full(70, 1e9, np.float32)
    x[size:] = behind
    row = x[:size].astype(np.float64)

    assert _sum_of_squares(x, size) == pytest.approx((row**2).sum(), rel=1e-5)
    assert _largest(x, size, np.float32(-9)) == x[:size].max()
    assert _largest(x, size, np.float32(9)) == 9

    copied, scaled = np.concatenate((weight[:size], behind)), np.concatenate((weight[:size], behind))
    _copy(x, size, copied)
    np.testing.assert_array_equal(copied, x)
    _scale(x, np.float32(0.3), weight, size, scaled)
    np.testing.assert_allclose(scaled[:size], weight[:size] * (x[:size] * np.float32(0.3)), rtol=1e-6)
    np.testing.assert_array_equal(scaled[size:], behind)
    added = scaled.copy()
    _add_scaled(x, np.float32(0.3), size, added)
    np.testing.assert_allclose(added[:size], scaled[:size] + np.float32(0.3) * x[:size], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(added[size:], behind)

    total = _exponentials(x, size, np.float32(1))
    np.testing.assert_allclose(x[:size], np.exp(row - 1), rtol=1e-6)
    np.testing.assert_array_equal(x[size:], behind)
    assert total == pytest.approx(np.exp(row - 1).sum(), rel=1e-5)


def test_a_number_that_is_none_is_not_the_largest() -> None:
    x = numbers(100)
    x[[3, 70]] = np.nan
    assert _largest(x, len(x), np.float32(-9)) == np.nanmax(x)


def test_a_softmax_by_columns_is_carried_on_from_block_to_block() -> None:
    blocks = [numbers(40 * size, 20).reshape(size, 40) for size in (7, 1, 30)]
    blocks[1][0, 3] = -np.inf
    blocks[2][[0, 4, 29], 5] = -np.inf
    every = np.concatenate(blocks)[:, :LANES].astype(np.float64)
    state = np.repeat(np.array([-np.inf, 0, np.nan], np.float32), LANES).reshape(3, LANES)
    sums = np.zeros(LANES)
    for block in blocks:
        beside = block[:, LANES:].copy()
        _exponential_columns(block, len(block), state)
        np.testing.assert_array_equal(block[:, LANES:], beside)
        sums = sums * state[2] + block[:, :LANES].sum(axis=0)
    np.testing.assert_array_equal(state[0], every.max(axis=0))
    expected = np.exp(every - every.max(axis=0)).sum(axis=0)
    np.testing.assert_allclose(state[1], expected, rtol=1e-5)
    np.testing.assert_allclose(sums, expected, rtol=1e-5)
    assert blocks[1][0, 3] == 0
    assert not blocks[2][[0, 4, 29], 5].any()


def test_a_column_with_a_score_that_is_none_has_no_sum() -> None:
    x = numbers(5 * LANES).reshape(5, LANES)
    x[2, 1] = np.nan
    most, state = np.nanmax(x, axis=0), np.zeros((3, LANES), np.float32)
    state[0] = -np.inf
    _exponential_columns(x, len(x), state)
    np.testing.assert_array_equal(state[0], most)
    assert np.flatnonzero(np.isnan(state[1])).tolist() == [1]


@pytest.mark.parametrize("depth", [LANES, 5 * LANES])
def test_rows_from_anywhere_are_packed_side_by_side(depth: int) -> None:
    x, out = numbers(40 * depth), np.full((depth + 1, LANES), np.nan, np.float32)
    offsets = np.random.default_rng().integers(0, len(x) - depth, LANES)
    _pack(x, offsets, depth, np.float32(0.3), out)
    expected = np.stack([x[at : at + depth] for at in offsets], axis=1) * np.float32(0.3)
    np.testing.assert_array_equal(out[:depth], expected)
    assert np.isnan(out[depth]).all()


@pytest.mark.parametrize("half", SIZES)
def test_two_halves_are_rotated_into_each_other(half: int) -> None:
    x, cos, sin = numbers(2 * half + 20), numbers(2 * half), numbers(2 * half)
    first, second, behind = x[:half].copy(), x[half : 2 * half].copy(), x[2 * half :].copy()
    _rotate(x, cos, sin, half)
    np.testing.assert_allclose(x[:half], first * cos[:half] - second * sin[:half], atol=1e-5)
    np.testing.assert_allclose(x[half : 2 * half], second * cos[half:] + first * sin[half:], atol=1e-5)
    np.testing.assert_array_equal(x[2 * half :], behind)


@pytest.mark.parametrize("depth", SIZES)
def test_products_of_one_vector_with_many_that_lie_anywhere(depth: int) -> None:
    x, y, out = numbers(depth + 9), numbers(3 * DOTS * depth), np.full(DOTS + 3, 7, np.float32)
    offsets = np.random.default_rng().integers(0, len(y) - depth, 2 * DOTS)
    _dots(x, y, offsets, 5, depth, np.float32(0.5), out)
    expected = [0.5 * (x[:depth].astype(np.float64) @ y[at : at + depth]) for at in offsets[5 : 5 + DOTS]]
    np.testing.assert_allclose(out[:DOTS], expected, atol=1e-4)
    np.testing.assert_array_equal(out[DOTS:], 7)
