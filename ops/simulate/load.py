"""Who asks when and for how much: a Mooncake trace, stacked, and squeezed into an envelope."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError

BLOCK_TOKENS = 512
"""Of the trace's prefix hashes."""
_GRID = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    at_s: float
    prompt_tokens: int
    new_tokens: int
    blocks: tuple[int, ...]
    """A number for every `BLOCK_TOKENS` of the prompt; equal numbers in front are an equal beginning."""


def read_requests(file: pathlib.Path, limit: int | None = None, option: str = "TRACE") -> list[Request]:
    """Lines of `timestamp` (ms), `input_length`, `output_length` and, if there are any, `hash_ids`; by time.

    Args:
        limit: only so many lines.
        option: what names the file on the command line.

    Raises: ConfigError naming the file, and the line.
    """
    requests = []
    try:
        # A line that is no text is then one that is no JSON.
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                entry = json.loads(line)
                requests.append(
                    Request(
                        at_s=entry["timestamp"] / 1000,
                        prompt_tokens=max(1, entry["input_length"]),
                        new_tokens=max(1, entry["output_length"]),
                        blocks=tuple(entry.get("hash_ids", ())),
                    )
                )
                if number == limit:
                    break
    except OSError as error:
        raise ConfigError(option, str(file), "a readable file of JSON lines", str(error)) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(option, f"{file}:{number}: {error}", "timestamp, input_length and output_length") from error
    if not requests:
        raise ConfigError(option, f"{file} without requests", "at least one line")
    return sorted(requests, key=lambda request: request.at_s)


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
