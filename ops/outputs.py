"""Files that a command writes at its end, looked at before it begins."""

from __future__ import annotations

import os
import pathlib

import typer

from octet.errors import ConfigError


def check_output(option: str, file: pathlib.Path | None) -> None:
    """Raises: ConfigError where a file of this name could not be written."""
    if file is None:
        return
    there = os.access(file, os.F_OK)
    # A device is in a directory where most make no files.
    place = file if there else file.parent
    if not os.access(place, os.W_OK) or place.is_dir() == there:
        raise ConfigError(option, str(file), "a file that can be written, in a directory that is there")


def checked(param: typer.CallbackParam, file: pathlib.Path | None) -> pathlib.Path | None:
    """For an option of a command line. Raises: as `check_output`."""
    check_output(param.opts[0], file)
    return file
