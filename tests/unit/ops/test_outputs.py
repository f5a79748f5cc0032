"""Files that a command writes at its end are looked at before it begins."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import typer

from octet.config import load_config
from octet.errors import ConfigError
from ops.bench.cli import bench
from ops.chaos.cli import chaos
from ops.outputs import check_output
from ops.simulate.command import SimulateOptions, simulate

NOWHERE = "nowhere/out"


def test_a_file_in_a_directory_that_is_there_can_be_written(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "out"
    check_output("--json", file)
    assert not file.exists()
    file.touch()
    check_output("--json", file)
    check_output("--json", pathlib.Path("out"))
    check_output("--json", pathlib.Path("/dev/null"))
    check_output("--json", None)


@pytest.mark.parametrize("name", [NOWHERE, "file/out", "."])
def test_what_cannot_be_written_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--json.*a directory that is there"):
        check_output("--json", tmp_path / name)


COMMANDS = {**typer.main.get_group(bench).commands, **typer.main.get_group(chaos).commands}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option.opts[0])
        for name, command in COMMANDS.items()
        for option in command.params
        if option.opts[0] in ("--json", "--html", "--plot")
    ],
)
def test_every_command_refuses_what_it_could_not_write_before_it_runs(name: str, option: str) -> None:
    with pytest.raises(ConfigError, match=f"{option}.*{NOWHERE}"):
        COMMANDS[name].make_context(name, [option, NOWHERE])


@pytest.mark.parametrize("option", ["json", "plot"])
def test_the_simulator_refuses_what_it_could_not_write_before_it_reads_anything(option: str) -> None:
    file: dict[str, Any] = {f"{option}_file": pathlib.Path(NOWHERE)}
    with pytest.raises(ConfigError, match=f"--{option}.*{NOWHERE}"):
        simulate(load_config(), SimulateOptions(trace=pathlib.Path("no-trace"), **file))
