"""How Ray starts the processes of a cluster: as forks of one that has imported everything.

See `cluster.workers.fork_server`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import ray

from cluster.workers import fork_client
from octet.config import OctetConfig

_DECIDES_THE_PYTHON = ("py_executable", "pip", "uv", "conda", "container", "image_uri", "nsight", "rocprof-sys")
"""Of a job's runtime environment: with one of these, workers do not run the Python of this process."""


def runtime_env(config: OctetConfig) -> dict[str, Any]:
    """For an actor's options. Empty where each process starts by itself."""
    environment = ray.get_runtime_context().runtime_env
    if not config.ray.fork_workers or any(environment.get(field) for field in _DECIDES_THE_PYTHON):
        return {}
    python = shlex.quote(sys.executable)
    # Ray has a shell read this. A node that has its Python elsewhere takes the one in its path.
    return {"py_executable": f"$(test -x {python} && echo {fork_client.command()} || echo python)"}


@contextlib.contextmanager
def forking() -> Iterator[None]:
    """A raylet that this process starts within asks for forks without help of Ray's.

    A worker with a runtime environment is set up by a Python process that imports all of Ray first: 0.6 s of a core, at
    a higher priority than that of whoever serves there. A raylet starts it by the `sys.executable` of whoever started
    the raylet, for which there is no option.
    """
    python, stand_in = sys.executable, _stand_in()
    if stand_in is not None:
        sys.executable = str(stand_in)
    try:
        yield
    finally:
        sys.executable = python


def _stand_in() -> pathlib.Path | None:
    """A shell's start takes a millisecond, and all of Ray's processes that are Python pass here.

    Returns: a script that is there as long as any raylet may be, which files in a folder for temporary ones are not;
        None where that cannot be written or run.
    """
    python = shlex.quote(sys.executable)
    script = f"""#!/bin/sh
case "$1" in
*/setup_worker.py) exec {fork_client.command()} "$@" ;;
*) exec {python} "$@" ;;
esac
"""
    try:
        folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "octet"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"python-{hashlib.sha256(script.encode()).hexdigest()[:12]}"
        if not path.exists():
            # Whole at once: others may be about to run it.
            with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
                file.write(script)
            pathlib.Path(file.name).chmod(0o700)
            pathlib.Path(file.name).replace(path)
    except (OSError, RuntimeError):
        return None
    return path if os.access(path, os.X_OK) else None
