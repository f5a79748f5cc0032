from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

from ops.heatmap import fold, heatmap, legend


def test_folding_keeps_the_largest_of_each_group() -> None:
    values_RC = np.random.default_rng().random((3, 10))
    folded_RF, group = fold(values_RC, 4)
    assert group == 3
    assert folded_RF.tolist() == [[max(row[i : i + 3]) for i in range(0, 10, 3)] for row in values_RC.tolist()]


@pytest.mark.parametrize("room", [10, 11, 200])
def test_what_fits_is_not_folded(room: int) -> None:
    values_RC = np.random.default_rng().random((2, 10))
    folded_RF, group = fold(values_RC, room)
    assert group == 1
    np.testing.assert_array_equal(folded_RF, values_RC)


def test_without_colours_blocks_grow_with_the_share() -> None:
    lines = heatmap(np.array([[0.0, 0.001, 0.5, 1.0], [1.0, 0.0, 0.0, 2.0]]), 1, colours=False)
    assert [line.cells.plain for line in lines] == [" ▁▄█", "█  █"]


def test_cells_may_be_wider_than_a_character() -> None:
    shares_RF = np.array([[0.0, 1.0]])
    assert heatmap(shares_RF, 2, colours=False)[0].cells.plain == "  ██"
    assert heatmap(shares_RF, 2, colours=True)[0].cells.cell_len == 4


def test_every_share_has_its_own_colour() -> None:
    (line,) = heatmap(np.array([[0.0, 0.3, 0.6, 1.0]]), 1, colours=True)
    colours = [span.style for span in line.cells.spans]
    assert len(set(map(str, colours))) == 4


def test_neighbours_of_one_colour_are_printed_at_once() -> None:
    (line,) = heatmap(np.zeros((1, 100)), 1, colours=True)
    assert len(line.cells.spans) == 1
    assert line.cells.cell_len == 100


def test_many_rows_go_two_to_a_line() -> None:
    lines = heatmap(np.random.default_rng().random((89, 5)), 1, colours=True)
    assert [line.rows for line in lines[:2]] == [range(2), range(2, 4)]
    assert lines[-1].rows == range(88, 89)
    assert len(lines) == 45


def test_the_upper_row_is_the_foreground_and_the_lower_one_the_background() -> None:
    shares_RF = np.zeros((40, 1))
    shares_RF[0] = 1.0
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor").print(heatmap(shares_RF, 1, colours=True)[0].cells)
    assert "38;2;252;255;164;48;2;11;7;36m▀" in out.getvalue()


def test_the_legend_spans_the_scale() -> None:
    assert legend(9, colours=False).plain == " ▁▂▃▄▅▆▇█"
    assert legend(24, colours=True).cell_len == 24
