"""The command line of the benchmarks: what is refused before anything runs."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ops.bench.cli import bench

OCTET = str(pathlib.Path(sys.executable).parent / "octet")


@pytest.mark.parametrize("command", ["peers", "breakdown"])
@pytest.mark.parametrize("streams", ["8,8", "1,2,1", "0", "a", ""])
def test_numbers_of_streams_are_whole_and_different(command: str, streams: str) -> None:
    result = CliRunner().invoke(bench, [command, "--streams", streams])
    assert result.exit_code == 2
    assert "--streams" in result.output
    assert repr(streams) in result.output


@pytest.mark.parametrize("name", ["file", "file/model", "x" * 300])
def test_a_checkpoint_that_cannot_be_written_is_one_line(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / "file").touch()
    command = [OCTET, "bench", "checkpoint", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("octet: config field 'MODEL_DIR': found")
    assert "Traceback" not in done.stderr
