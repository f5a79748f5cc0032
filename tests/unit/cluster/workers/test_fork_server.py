"""A fork server becomes what it is asked for, and whoever finds none does without."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
from ray._private.runtime_env.context import RuntimeEnvContext

from cluster.workers import fork_client
from cluster.workers.worker_start import forking

IDLE_S = 2.0
FORK_CLIENT = (sys.executable, "-I", "-S", fork_client.__file__)
RAYS_SETUP = pathlib.Path(ray.__file__).parent / "_private/workers/setup_worker.py"
_TELL = """
import json, os, pathlib, sys
print(json.dumps({
    "name": __name__, "argv": sys.argv, "cwd": str(pathlib.Path.cwd()), "env": os.environ.get("ASKED"),
    "preloaded": "colorsys" in sys.modules, "path": sys.path, "priority": os.getpriority(os.PRIO_PROCESS, 0),
    "pid": os.getpid(), "group": os.getpgid(0), "drawn": __import__("random").random(),
}))
if "wait" in sys.argv:
    __import__("time").sleep(60)
"""


@pytest.fixture
def script(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "tell.py"
    path.write_text(_TELL)
    return path


@contextlib.contextmanager
def serving(script: pathlib.Path, idle_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """By one that has imported `colorsys`, which nothing else does."""
    path = fork_client.address(arguments(script))
    program = "import pathlib, sys; from cluster.workers.fork_server import run; "
    program += "run(pathlib.Path(sys.argv[1]), ['colorsys'], float(sys.argv[2]))"
    with subprocess.Popen([sys.executable, "-c", program, str(path), str(idle_s)]) as process:
        wait_for(path)
        yield process
        process.kill()


def wait_for(path: pathlib.Path) -> None:
    """Until somebody listens there, which is a moment after there is something."""
    deadline_s = time.monotonic() + 30
    while True:
        with (
            socket.socket(socket.AF_UNIX) as connection,
            contextlib.suppress(FileNotFoundError, ConnectionRefusedError),
        ):
            connection.connect(str(path))
            return
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


@pytest.fixture
def server(script: pathlib.Path) -> Iterator[subprocess.Popen[bytes]]:
    """One that waits for whoever is slow to ask."""
    with serving(script, 60.0) as process:
        yield process


def arguments(script: pathlib.Path, *more: str) -> list[str]:
    return [str(script), f"--object-store-name={script.parent}/plasma_store", *more]


def start(
    script: pathlib.Path, *more: str, python: Sequence[str] = FORK_CLIENT, first: Sequence[str] = (), **env: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*python, *first, *arguments(script, *more)],
        env=dict(os.environ) | env,
        cwd=script.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(script: pathlib.Path, *more: str, **how: Any) -> dict[str, object]:
    out, error = start(script, *more, **how).communicate(timeout=60)
    assert error == ""
    answer: dict[str, object] = json.loads(out)
    return answer


def test_a_worker_is_what_python_would_have_made_of_it(server: subprocess.Popen[bytes], script: pathlib.Path) -> None:
    first, second = (told(script, "--number", n, ASKED=n, PYTHONPATH=f"/somewhere/{n}") for n in "12")
    for number, one in zip("12", (first, second), strict=True):
        assert one["name"] == "__main__"
        assert one["argv"] == arguments(script, "--number", number)
        assert one["cwd"] == str(script.parent)
        assert one["env"] == number
        assert f"/somewhere/{number}" in one["path"]  # type: ignore[operator]
        assert one["preloaded"]
        assert one["group"] == one["pid"] != server.pid
        assert one["priority"] == os.getpriority(os.PRIO_PROCESS, 0)
    # Two forks of one process draw different numbers.
    assert first["drawn"] != second["drawn"]


def test_it_ends_when_it_has_no_child_any_more_and_not_before(script: pathlib.Path) -> None:
    with serving(script, IDLE_S) as server:
        with start(script, "wait") as waiting:
            assert waiting.stdout is not None
            pid = json.loads(waiting.stdout.readline())["pid"]
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(3 * IDLE_S)
        os.kill(pid, signal.SIGKILL)
        # Nothing of the worker is left for anybody to find.
        time.sleep(0.2)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert server.wait(10) == 0
    assert not fork_client.address(arguments(script)).exists()


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"\0\0", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\2{}", b"\0\0\0\1[", b"\0\0\0\4true"],
)
def test_a_request_that_makes_no_sense_harms_nobody(
    server: subprocess.Popen[bytes], script: pathlib.Path, request_bytes: bytes
) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(fork_client.address(arguments(script))))
        with contextlib.suppress(BrokenPipeError):
            stranger.sendall(request_bytes)
    assert told(script)["preloaded"]


def test_where_no_server_can_be_a_worker_starts_by_itself(script: pathlib.Path) -> None:
    # Beside a socket whose folder there is not, there can be none.
    process = subprocess.run(
        [*FORK_CLIENT, str(script), "--object-store-name=/nowhere/plasma_store"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "starts by itself" in process.stderr
    assert not json.loads(process.stdout)["preloaded"]


def test_a_server_of_somebody_else_is_not_asked(server: subprocess.Popen[bytes], script: pathlib.Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can give a socket away")
    os.chown(fork_client.address(arguments(script)), 12345, -1)
    out, error = start(script).communicate(timeout=60)
    assert "somebody else's" in error
    assert not json.loads(out)["preloaded"]


def test_workers_of_which_ray_is_told_other_things_are_not_forks_of_one_process(
    script: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_ID", "01000000")
    first = fork_client.address(arguments(script))
    assert fork_client.address(arguments(script, "--another")) == first
    monkeypatch.setenv("RAY_JOB_ID", "02000000")
    assert fork_client.address(arguments(script)) != first


def test_what_members_need_starts_no_thread() -> None:
    program = "import pathlib, sys; from cluster.workers.fork_server import run; "
    program += "run(pathlib.Path(sys.argv[1]), idle_s=0.0)"
    with tempfile.TemporaryDirectory() as scratch:
        env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        subprocess.run([sys.executable, "-c", program, f"{scratch}/fork"], env=env, timeout=120, check=True)


def context(**fields: Any) -> list[str]:
    """What a raylet adds to the arguments of a worker with a runtime environment, in Ray's own words."""
    return [
        "--language=PYTHON",
        f"--serialized-runtime-env-context={RuntimeEnvContext(**fields).serialize()}",
    ]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    python, stand_ins = sys.executable, set()
    for _ in range(2):
        with forking():
            stand_ins.add(sys.executable)
        assert sys.executable == python
    (stand_in,) = stand_ins
    assert [str(path) for path in (tmp_path / "cache/octet").iterdir()] == [stand_in]
    return stand_in


def test_a_raylet_of_ours_has_workers_set_up_without_ray(
    server: subprocess.Popen[bytes], script: pathlib.Path, stand_in: str
) -> None:
    ours = context(py_executable=f"$({fork_client.command()})", env_vars={"ASKED": "yes"})
    answer = told(script, *ours, "--last", python=[stand_in], first=[str(RAYS_SETUP)])
    assert answer["preloaded"]
    assert answer["env"] == "yes"
    # As Ray's own script leaves them.
    assert answer["argv"] == arguments(script, "--last")


@pytest.mark.parametrize("variables", [{}, {"ASKED": "yes"}])
def test_a_raylet_of_ours_leaves_workers_of_other_pythons_to_ray(
    server: subprocess.Popen[bytes], script: pathlib.Path, stand_in: str, variables: dict[str, str]
) -> None:
    theirs = context(py_executable=sys.executable, env_vars=variables)
    answer = told(script, *theirs, python=[stand_in], first=[str(RAYS_SETUP)])
    assert not answer["preloaded"]
    assert answer["env"] == variables.get("ASKED")


@pytest.mark.parametrize(
    "more", [{"command_prefix": ["export ASKED=yes &&"]}, {"override_worker_entrypoint": "another.py"}]
)
def test_a_raylet_of_ours_leaves_environments_of_more_than_a_python_to_ray(more: dict[str, Any]) -> None:
    ours = [str(RAYS_SETUP), "worker.py", *context(py_executable=fork_client.command())]
    assert fork_client.set_up(ours) == ["worker.py"]
    assert fork_client.set_up([*ours[:2], *context(py_executable=fork_client.command(), **more)]) is None


@pytest.mark.parametrize(
    "said", ["", "{", "[]", "1", '{"py_executable": null}', '{"py_executable": 1, "env_vars": {}}']
)
def test_what_does_not_read_as_an_environment_is_rays(said: str) -> None:
    assert fork_client.set_up([str(RAYS_SETUP), "worker.py", f"--serialized-runtime-env-context={said}"]) is None


def test_all_other_python_of_a_raylet_of_ours_is_python(stand_in: str, tmp_path: pathlib.Path) -> None:
    program = "import sys; print(sys.executable, sys.argv[1:])"
    said = subprocess.run(
        [stand_in, "-c", program, "two words"], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout == f"{sys.executable} {['two words']}\n"


def test_where_the_script_cannot_be_run_or_written_a_raylet_is_started_by_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    python = sys.executable
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        with forking():
            assert sys.executable == python
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with forking():
        assert sys.executable == python
