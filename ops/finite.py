"""Options that are numbers with a lower bound only, which keeps no infinity out."""

from __future__ import annotations

import math

import typer


def finite(value: float | None) -> float | None:
    """For an option of a command line. Raises: typer.BadParameter."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"found {value}, expected a number that is finite")
    return value
