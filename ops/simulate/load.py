"""Who asks when and for how much: a Mooncake trace, stacked, and squeezed into an envelope."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError

BLOCK_TOKENS = 512
"""Of the trace's prefix hashes."""
_LATEST_MS = 1e16
"""Some 300,000 years."""
_GRID = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    at_s: float
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...]
    """A number for every `BLOCK_TOKENS` of the prompt; equal numbers in front are an equal beginning."""


def read_requests(file: pathlib.Path, limit: int | None = None, option: str = "TRACE") -> list[Request]:
    """Lines of `timestamp` (ms), `input_length`, `output_length` and, if there are any, `hash_ids`; by time, the first
    at 0: a trace may count its milliseconds from anywhere.

    Args:
        limit: only so many lines.
        option: what names the file on the command line.

    Raises: ConfigError naming the file, the line and the field.
    """
    requests = []
    try:
        # A line that is no text is then one that is no JSON.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                requests.append(_parsed(line, option, f"{file}:{number}"))
                if number == limit:
                    break
    except OSError as error:
        raise ConfigError(option, str(file), "a readable file of JSON lines", str(error)) from error
    if not requests:
        raise ConfigError(option, f"{file} without requests", "at least one line")
    first_s = min(request.at_s for request in requests)
    requests = [dataclasses.replace(request, at_s=request.at_s - first_s) for request in requests]
    return sorted(requests, key=lambda request: request.at_s)


def _parsed(line: bytes, option: str, where: str) -> Request:
    """Raises: ConfigError."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(option, f"{where}: {error}", "a JSON object") from error
    if not isinstance(entry, dict):
        raise ConfigError(option, f"{where}: {entry!r}", "a JSON object")

    def field(name: str, is_valid: Callable[[Any], bool], expected: str) -> Any:
        if name not in entry:
            raise ConfigError(option, f"{where}: no {name}", expected)
        if not is_valid(entry[name]):
            raise ConfigError(option, f"{where}: {name} {entry[name]!r}", expected)
        return entry[name]

    at_ms = field("timestamp", _is_time, "a number of milliseconds")
    tokens = [
        max(1, field(name, _is_count, "a whole number of tokens, 0 or more"))
        for name in ("input_length", "output_length")
    ]
    blocks = field("hash_ids", _are_blocks, "a list of whole numbers") if "hash_ids" in entry else ()
    return Request(at_s=at_ms / 1000, prompt_tokens=tokens[0], new_tokens=tokens[1], blocks=tuple(blocks))


def _is_time(value: Any) -> bool:
    # Neither NaN nor infinity is, nor what a float has no room for.
    return _is_number(value, int | float) and abs(value) <= _LATEST_MS


def _is_count(value: Any) -> bool:
    return _is_number(value, int) and value >= 0


def _are_blocks(value: Any) -> bool:
    return isinstance(value, list) and all(_is_number(one, int) for one in value)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def stacked(requests: list[Request], copies: int, rng: np.random.Generator) -> list[Request]:
    """So many times the load: every copy begins at another point of the trace, and shares no prefix with others."""
    length_s = requests[-1].at_s + 1e-3
    most = 1 + max((max(request.blocks, default=0) for request in requests), default=0)
    all_of_them = list(requests)
    for copy in range(1, copies):
        shift_s = rng.uniform(0, length_s)
        all_of_them += [
            dataclasses.replace(
                request,
                at_s=(request.at_s + shift_s) % length_s,
                blocks=tuple(block + copy * most for block in request.blocks),
            )
            for request in requests
        ]
    return sorted(all_of_them, key=lambda request: request.at_s)


def day(trough: float) -> Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]:
    """A day's rate, from `trough` at both ends to 1 in the middle: `trough + (1 − trough) · sin⁴(πu)`.

    Its mean is `trough + (1 − trough) · 3/8`.
    """
    return lambda u: trough + (1 - trough) * np.sin(np.pi * u) ** 4


def enveloped(
    requests: list[Request], duration_s: float, rate: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]
) -> list[Request]:
    """The same requests in the same order over `duration_s`, as dense as `rate` of the elapsed share, `[0, 1]`, says.

    Time is stretched, not drawn anew: what is bursty within a minute stays so.
    """
    u = np.linspace(0, 1, _GRID + 1)
    density = rate(u)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    length_s = requests[-1].at_s + 1e-3
    shares = np.array([request.at_s for request in requests]) / length_s
    times_s = np.interp(shares, mass / mass[-1], u) * duration_s
    return [dataclasses.replace(request, at_s=at_s) for request, at_s in zip(requests, times_s.tolist(), strict=True)]
