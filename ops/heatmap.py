"""A matrix of shares as coloured cells on a terminal, or as blocks of growing height where there are no colours.

Shapes: `R` rows, `C` columns, `F` columns after folding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rich.color import Color
from rich.style import Style
from rich.text import Text

_RAMP = ("#0b0724", "#2a0b55", "#65156e", "#9f2a63", "#d44842", "#f57d15", "#fac228", "#fcffa4")
"""Dark to light by evenly growing lightness: the "inferno" map of matplotlib, its ends brought in."""
_BLOCKS = " ▁▂▃▄▅▆▇█"
_UPPER_HALF = "▀"
_MAX_SINGLE_ROWS = 32
"""More rows than these go two to a line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """One line of a heatmap, and the rows that are on it."""

    rows: range
    cells: Text


def fold(values_RC: npt.NDArray[np.float64], max_columns: int) -> tuple[npt.NDArray[np.float64], int]:
    """At most so many columns `[R, F]`: the largest of each group of neighbours. Also how many a group has."""
    num_rows, num_columns = values_RC.shape
    group = max(1, -(-num_columns // max_columns))
    padding = -num_columns % group
    padded = np.pad(values_RC, ((0, 0), (0, padding)), constant_values=-np.inf)
    return padded.reshape(num_rows, -1, group).max(2), group


def heatmap(shares_RF: npt.NDArray[np.float64], cell_width: int, colours: bool) -> list[Line]:
    """Shares between 0 and 1 as cells. Many rows go two to a line, by the upper and the lower half of a character."""
    num_rows = len(shares_RF)
    if not colours:
        return [Line(range(r, r + 1), Text(_blocks(shares_RF[r], cell_width))) for r in range(num_rows)]
    if num_rows <= _MAX_SINGLE_ROWS:
        return [Line(range(r, r + 1), _cells(shares_RF[r], shares_RF[r], cell_width)) for r in range(num_rows)]
    pairs = [range(r, min(r + 2, num_rows)) for r in range(0, num_rows, 2)]
    return [Line(rows, _cells(shares_RF[rows[0]], shares_RF[rows[-1]], cell_width)) for rows in pairs]


def legend(width: int, colours: bool) -> Text:
    """The scale from 0 to 1."""
    steps = np.linspace(0, 1, width)
    return _cells(steps, steps, 1) if colours else Text(_blocks(steps, 1))


def _blocks(shares_F: npt.NDArray[np.float64], width: int) -> str:
    """Anything above 0 can be seen."""
    levels = np.ceil(np.clip(shares_F, 0, 1) * (len(_BLOCKS) - 1)).astype(int)
    return "".join(_BLOCKS[level] * width for level in levels)


def _cells(upper_F: npt.NDArray[np.float64], lower_F: npt.NDArray[np.float64], width: int) -> Text:
    text = Text()
    cells = zip(_colours(upper_F), _colours(lower_F), strict=True)
    # Neighbours of one colour are one piece, or a large heatmap would be slow to print.
    for (upper, lower), run in itertools.groupby(cells):
        text.append(_UPPER_HALF * width * len(list(run)), Style(color=upper, bgcolor=lower))
    return text


def _colours(shares_F: npt.NDArray[np.float64]) -> Sequence[Color]:
    stops = np.array([Color.parse(stop).get_truecolor() for stop in _RAMP], dtype=float)
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(np.clip(shares_F, 0, 1), at, stops[:, channel]) for channel in range(3)]
    return [Color.from_rgb(*rgb) for rgb in np.stack(channels, 1).round()]
