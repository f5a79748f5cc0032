"""Who may import whom, read from the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
BELOW_CLUSTER = ("octet", "model", "experts", "router", "prefill", "decode")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "octet": (),
    "model": ("octet",),
    "experts": ("octet", "model"),
    "router": ("octet", "model"),
    "prefill": ("octet", "model", "router"),
    "decode": ("octet", "model", "router"),
    "cluster": BELOW_CLUSTER,
    "ops": (*BELOW_CLUSTER, "cluster"),
}
CLUSTER_ROOMS: tuple[str, ...] = ("autoscaling", "workers", "frontend", "api", "control")
"""Of the largest package, each imports from those before it and from what they all share."""
ENTRANCES = {"cluster.launch", "cluster.inventory"}
"""They stand beside the rooms, and none of these imports them."""
EVALUATES_WHAT_IT_READS = {"pickle", "_pickle", "cPickle", "cloudpickle", "marshal", "dill", "shelve", "joblib"}

PICKLES_INSIDE = {
    *(f"{way}_{kind}" for way in ("send", "recv") for kind in ("pyobj", "serialized", "object_list")),
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "allow_pickle"),
}


def files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(module, line) of every import at any depth, also by `importlib.import_module` of a constant."""
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            yield node.module or "", node.lineno
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called in ("__import__", "import_module", "importlib.import_module"):
                yield str(node.args[0].value), node.lineno


def offences(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in files(package)
        for module, line in imports(file)
        if module.partition(".")[0] in forbidden
    ]


def test_every_package_of_ours_is_looked_at() -> None:
    ours = {file.parent.relative_to(ROOT).parts[0] for file in ROOT.glob("*/*.py")}
    assert ours - {"tests", "docs", "deploy"} == set(MAY_IMPORT)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_import_runs_upward_or_across(package: str) -> None:
    assert files(package)
    assert offences(package, set(MAY_IMPORT) - {package, *MAY_IMPORT[package]}) == []


def test_every_room_of_the_cluster_is_looked_at() -> None:
    assert {file.parent.name for file in ROOT.glob("cluster/*/*.py")} == set(CLUSTER_ROOMS)


@pytest.mark.parametrize("room", [*CLUSTER_ROOMS, None], ids=str)
def test_no_import_within_the_cluster_runs_upward(room: str | None) -> None:
    if room is None:
        looked_at, above = list(ROOT.glob("cluster/*.py")), CLUSTER_ROOMS
    else:
        looked_at, above = files(f"cluster/{room}"), CLUSTER_ROOMS[CLUSTER_ROOMS.index(room) + 1 :]
    forbidden = {*(f"cluster.{name}" for name in above), *ENTRANCES}
    assert [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in looked_at
        if f"cluster.{file.stem}" not in ENTRANCES
        for module, line in imports(file)
        if any(f"{module}.".startswith(f"{name}.") for name in forbidden)
    ] == []


@pytest.mark.parametrize("package", [package for package in MAY_IMPORT if package != "cluster"])
def test_only_cluster_imports_ray(package: str) -> None:
    assert offences(package, {"ray"}) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_nothing_received_is_ever_evaluated(package: str) -> None:
    assert offences(package, EVALUATES_WHAT_IT_READS) == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_call_pickles_what_it_sends_or_receives(package: str) -> None:
    """Calls of ZeroMQ, torch and NumPy that do so inside."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno} names {node.attr}"
        for file in files(package)
        for node in ast.walk(ast.parse(file.read_text(), str(file)))
        if isinstance(node, ast.Attribute)
        and (node.attr in PICKLES_INSIDE or ast.unparse(node) in ("torch.load", "torch.save"))
    ]
    assert found == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_nothing_of_ours_imports_the_tests(package: str) -> None:
    assert offences(package, {"tests"}) == []


@pytest.mark.parametrize(
    "module", ["octet", "octet.client", "octet.config", "octet.errors", "octet.messages", "octet.v1.octet_pb2_grpc"]
)
def test_the_public_face_is_light(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not there")
    script = f"import sys, {module}; print(*sorted({{'torch', 'ray', 'numpy', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == []
