"""Traces on disk. `.jsonl`: a line for the header, then one per window. `.npz`: arrays."""

from __future__ import annotations

import json
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from octet.errors import TraceError
from router.trace.arrays import from_arrays, to_arrays
from router.trace.trees import checked, header_tree, parse_header, parse_json, parse_window, window_tree
from router.trace.values import Trace, TraceHeader, TraceWindow

_LINES, _ARRAYS = ".jsonl", ".npz"


class TraceWriter:
    """Windows in by `add`. Lines are on disk as soon as they are added, arrays when it is closed."""

    def __init__(self, file: pathlib.Path, header: TraceHeader) -> None:
        """Raises: TraceError if the file cannot be written, or its name says neither format."""
        self._lines, self._header = _is_lines(file), header
        self._windows: list[TraceWindow] = []
        try:
            # Opened for arrays as well: it is refused now, and not after an hour of recording.
            self._out = file.open("wb")
        except OSError as error:
            raise TraceError(str(file), "", error.strerror, "a file that can be written") from error
        if self._lines:
            self._write_line(header_tree(header))

    def add(self, window: TraceWindow) -> None:
        if self._lines:
            self._write_line(window_tree(window))
        else:
            self._windows.append(window)

    def close(self) -> None:
        if not self._lines:
            np.savez_compressed(self._out, allow_pickle=False, **to_arrays(self._header, self._windows))
        self._out.close()

    def _write_line(self, tree: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(tree, separators=(",", ":")).encode() + b"\n")
        self._out.flush()


def read_trace(file: pathlib.Path) -> Trace:
    """Raises: TraceError, which names the line, the window or the array."""
    lines = _is_lines(file)
    try:
        return _read_lines(file) if lines else from_arrays(str(file), _read_arrays(file))
    except OSError as error:
        raise TraceError(str(file), "", error.strerror or str(error), "a file that can be read") from error


def _is_lines(file: pathlib.Path) -> bool:
    if file.suffix not in (_LINES, _ARRAYS):
        raise TraceError(str(file), "", f"the suffix {file.suffix!r}", f"{_LINES} or {_ARRAYS}")
    return file.suffix == _LINES


def _read_lines(file: pathlib.Path) -> Trace:
    name = str(file)
    with file.open(encoding="utf-8", errors="replace") as lines:
        header = parse_header(name, "line 1", parse_json(name, "line 1", next(lines, "")))
        windows = [
            parse_window(name, f"line {number}", parse_json(name, f"line {number}", line), header)
            for number, line in enumerate(lines, start=2)
            if line.strip()
        ]
    return checked(name, header, windows)


def _read_arrays(file: pathlib.Path) -> dict[str, Any]:
    try:
        # Numpy leaves a file open that it cannot read.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(str(file), "", str(error), "the arrays of a trace") from None
