"""A trace as the arrays of an `.npz` file: those of a window with one axis more in front, and the header as JSON text.

Shapes: `W` windows, `L` mixture-of-experts layers, `E` logical experts, `M` members.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from octet.errors import TraceError
from router.trace.trees import checked, header_tree, parse_header, parse_json, parse_window
from router.trace.values import MEMBER_NUMBERS, MemberRecord, Trace, TraceHeader, TraceWindow

_NUMBERS = ("t_s", "duration_s", "tokens", "balancedness")
_ABSENT = MemberRecord(**dict.fromkeys(MEMBER_NUMBERS, math.nan))
"""A member that did not answer in a window."""


def to_arrays(header: TraceHeader, windows: Sequence[TraceWindow]) -> dict[str, Any]:
    names = sorted({name for window in windows for name in window.members})
    loads_WLE = np.zeros((len(windows), len(header.layers), header.num_experts))
    members = {number: np.empty((len(windows), len(names))) for number in MEMBER_NUMBERS}
    for index, window in enumerate(windows):
        loads_WLE[index] = window.loads_LE
        records = [window.members.get(name, _ABSENT) for name in names]
        for number, values_WM in members.items():
            values_WM[index] = [getattr(record, number) for record in records]
    return {
        "header": np.array(json.dumps(header_tree(header))),
        "loads_LE": loads_WLE,
        "members": np.array(names, dtype=np.str_),
        **{name: np.array([getattr(window, name) for window in windows], dtype=np.float64) for name in _NUMBERS},
        **{f"member_{number}": values_WM for number, values_WM in members.items()},
    }


def from_arrays(file: str, arrays: Mapping[str, Any]) -> Trace:
    """Raises: TraceError, which names the array or the window."""
    header = parse_header(file, "header", parse_json(file, "header", str(arrays.get("header", ""))))
    for name in (*_NUMBERS, "loads_LE", "members", *(f"member_{number}" for number in MEMBER_NUMBERS)):
        if name not in arrays:
            raise TraceError(file, name, "nothing", "an array")
    num_windows, num_members = len(arrays["t_s"]), len(arrays["members"])
    for name, array in arrays.items():
        expected = (num_windows, num_members) if name.startswith("member_") else (num_windows,)
        if name not in ("header", "members") and array.shape[: len(expected)] != expected:
            raise TraceError(file, name, f"an array of {list(array.shape)}", f"{list(expected)} in front")
    windows = [
        parse_window(file, f"window {index}", tree, header) for index, tree in enumerate(_trees(arrays, num_windows))
    ]
    return checked(file, header, windows)


def _trees(arrays: Mapping[str, Any], num_windows: int) -> Iterator[dict[str, Any]]:
    names = arrays["members"].tolist()
    for index in range(num_windows):
        columns = zip(*(arrays[f"member_{number}"][index] for number in MEMBER_NUMBERS), strict=True)
        records = {
            name: dict(zip(MEMBER_NUMBERS, column, strict=True)) for name, column in zip(names, columns, strict=True)
        }
        present = {name: record for name, record in records.items() if not any(map(math.isnan, record.values()))}
        yield {name: arrays[name][index] for name in (*_NUMBERS, "loads_LE")} | {"members": present}
