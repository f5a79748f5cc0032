"""The committed stubs are what the compiler makes of the committed protocol."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
PROTO = pathlib.Path("octet/v1/octet.proto")
STUBS = ["octet_pb2.py", "octet_pb2.pyi", "octet_pb2_grpc.py"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("protocol")
    (root / PROTO).parent.mkdir(parents=True)
    shutil.copy(ROOT / PROTO, root / PROTO)
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", str(PROTO)]
    subprocess.run([*command, "--python_out=.", "--grpc_python_out=.", "--pyi_out=."], cwd=root, check=True, timeout=60)
    return root / PROTO.parent


@pytest.mark.parametrize("name", STUBS)
def test_the_committed_stub_is_up_to_date(made: pathlib.Path, name: str) -> None:
    assert (ROOT / PROTO).with_name(name).read_text() == (made / name).read_text()


def test_the_compiler_makes_no_other_files(made: pathlib.Path) -> None:
    assert sorted(file.name for file in made.iterdir()) == sorted([PROTO.name, *STUBS])
