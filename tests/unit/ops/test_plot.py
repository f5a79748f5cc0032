"""The pictures of a load, and of a balancer."""

from __future__ import annotations

import pathlib
import random

import pytest
from matplotlib.image import imread

from octet.errors import ConfigError
from ops.bench.balance_plot import BatchLevels, Levels, draw_balance
from ops.bench.load import Outcome
from ops.bench.plot import draw_load, require_matplotlib
from ops.bench.summary import summarize


def _outcomes(num_good: int) -> list[Outcome]:
    good = [
        Outcome(due_s=random.random(), prompt_tokens=8, token_times_s=(0.2, 0.3, 0.3 + random.random()), end_s=1.4)
        for _ in range(num_good)
    ]
    return [*good, Outcome(due_s=0.5, prompt_tokens=8, token_times_s=(), end_s=0.1, error="UNAVAILABLE")]


@pytest.mark.parametrize("num_good", [0, 1, 20])
def test_any_load_can_be_drawn(num_good: int, tmp_path: pathlib.Path) -> None:
    outcomes, file = _outcomes(num_good), tmp_path / "load.png"
    draw_load(file, outcomes, summarize(outcomes, 3.0, 0.25, 0.5), 0.25, 0.5)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert imread(file).std() > 0.01


@pytest.mark.parametrize("num_cases", [1, 5])
def test_any_levels_can_be_drawn(num_cases: int, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "balance.png"
    cases = [Levels(16, 176 + number, *(random.random() for _ in range(4))) for number in range(num_cases)]
    batches = [BatchLevels(8**number, random.random(), random.random()) for number in range(num_cases)]
    draw_balance(file, cases, batches)
    assert imread(file).std() > 0.01


def test_a_plot_is_a_png() -> None:
    with pytest.raises(ConfigError, match=r"load\.txt"):
        require_matplotlib(pathlib.Path("load.txt"))
