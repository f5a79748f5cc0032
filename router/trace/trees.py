"""Headers and windows of a trace as JSON trees, and back with every check.

Shapes: `L` mixture-of-experts layers, `E` logical experts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octet.errors import TraceError
from router.trace.values import MEMBER_NUMBERS, MemberRecord, Trace, TraceHeader, TraceWindow

FORMAT, VERSION = "octet-telemetry", 1
_SHOWN = 40
"""Characters of what is wrong that an error quotes."""


def parse_json(file: str, where: str, text: str) -> dict[str, Any]:
    """Raises: TraceError."""
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise TraceError(file, where, repr(text[:_SHOWN]), "a JSON object")
    return tree


def header_tree(header: TraceHeader) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(header)}


def parse_header(file: str, where: str, tree: Mapping[str, Any]) -> TraceHeader:
    """Raises: TraceError for another format, or a version that this code does not know."""
    if tree.get("format") != FORMAT:
        raise TraceError(file, where, f"the format {tree.get('format')!r}", repr(FORMAT))
    if tree.get("version") != VERSION:
        fix = "read it with the version of Octet that wrote it"
        raise TraceError(file, where, f"version {tree.get('version')!r}", f"version {VERSION}", fix)
    try:
        return TraceHeader(
            model=str(tree["model"]),
            layers=tuple(int(layer) for layer in tree["layers"]),
            num_experts=int(tree["num_experts"]),
            experts_per_token=int(tree["experts_per_token"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(file, where, _told(error), "model, layers, num_experts and experts_per_token") from None


def window_tree(window: TraceWindow) -> dict[str, Any]:
    return {
        "t_s": round(window.t_s, 6),
        "duration_s": round(window.duration_s, 6),
        "tokens": window.tokens,
        "balancedness": window.balancedness,
        # Rows are whole, and "12" is shorter than "12.0".
        "loads_LE": [[int(load) if load.is_integer() else load for load in row] for row in window.loads_LE.tolist()],
        "members": {name: dataclasses.asdict(record) for name, record in window.members.items()},
    }


def parse_window(file: str, where: str, tree: Mapping[str, Any], header: TraceHeader) -> TraceWindow:
    """Raises: TraceError."""
    shape_LE = (len(header.layers), header.num_experts)
    try:
        window = TraceWindow(
            t_s=float(tree["t_s"]),
            duration_s=float(tree["duration_s"]),
            tokens=float(tree["tokens"]),
            balancedness=float(tree["balancedness"]),
            loads_LE=np.array(tree["loads_LE"], dtype=np.float64),
            members={
                str(name): MemberRecord(**{number: float(record[number]) for number in MEMBER_NUMBERS})
                for name, record in tree["members"].items()
            },
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TraceError(file, where, _told(error), f"a window, with loads_LE of {list(shape_LE)}") from None
    if window.loads_LE.shape != shape_LE:
        raise TraceError(file, where, f"loads_LE of {list(window.loads_LE.shape)}", f"{list(shape_LE)}")
    if not np.isfinite(window.loads_LE).all() or (window.loads_LE < 0).any():
        raise TraceError(file, where, "a load that is no count of rows", "0 and more")
    return window


def checked(file: str, header: TraceHeader, windows: Sequence[TraceWindow]) -> Trace:
    """Raises: TraceError if time does not go on from window to window."""
    before_s = -math.inf
    for index, window in enumerate(windows):
        if not (before_s < window.t_s < math.inf and 0 < window.duration_s < math.inf):
            found = f"{window.duration_s} s from {window.t_s} s on"
            raise TraceError(file, f"window {index}", found, f"some time after {before_s} s")
        before_s = window.t_s
    return Trace(header=header, windows=tuple(windows))


def _told(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)[:_SHOWN]
