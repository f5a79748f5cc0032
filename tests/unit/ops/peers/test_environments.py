"""Environments of peers, built from a wheel made here: no package index is asked."""

from __future__ import annotations

import pathlib
import subprocess
import zipfile

import pytest

from ops.bench.peers.environments import Environment, PeerError, build, needs

METADATA = """Metadata-Version: 2.1
Name: tiny
Version: 1.0
Requires-Dist: Torch==2.13.0
Requires-Dist: torchvision; platform_machine == "x86_64"
Requires-Dist: torch-like>=1
Requires-Dist: numpy (>=1.0)
Requires-Dist: ray; extra == "cluster"
Requires-Dist: regex
"""


def write_wheel(folder: pathlib.Path, metadata: str) -> pathlib.Path:
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "ANSWER = 42\n")
        archive.writestr("tiny-1.0.dist-info/METADATA", metadata)
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return wheel


def test_what_is_left_out_is_left_out_by_its_whole_name(tmp_path: pathlib.Path) -> None:
    wheel = write_wheel(tmp_path, METADATA)
    assert needs(wheel, ["torch", "torchvision"]) == ["torch-like>=1", "numpy (>=1.0)", "regex"]


def test_an_environment_is_built_once(tmp_path: pathlib.Path) -> None:
    wheel = write_wheel(tmp_path, "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    environment = Environment(name="tiny-1.0", requirements=(str(wheel),))
    python = build(environment, tmp_path / "peers")
    asked = subprocess.run([str(python), "-I", "-c", "import tiny; print(tiny.ANSWER)"], capture_output=True, text=True)
    assert asked.stdout == "42\n"
    before = python.lstat().st_mtime_ns
    wheel.unlink()
    assert build(environment, tmp_path / "peers") == python
    assert python.lstat().st_mtime_ns == before


def test_what_cannot_be_built_is_a_peer_error_and_not_taken_for_built(tmp_path: pathlib.Path) -> None:
    environment = Environment(name="gone-1.0", requirements=(str(tmp_path / "gone-1.0-py3-none-any.whl"),))
    for _ in range(2):
        with pytest.raises(PeerError, match=r"peer 'gone-1\.0': could not be built"):
            build(environment, tmp_path)
