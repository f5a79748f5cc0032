"""How Ray starts the processes of a cluster: as forks of one that has imported everything.

See `cluster.fork_server`.
"""

from __future__ import annotations

import shlex
import sys
from typing import Any

import ray

from cluster import fork_client
from octet.config import OctetConfig

_DECIDES_THE_PYTHON = ("py_executable", "pip", "uv", "conda", "container", "image_uri", "nsight", "rocprof-sys")
"""Of a job's runtime environment: with one of these, workers do not run the Python of this process."""


def runtime_env(config: OctetConfig) -> dict[str, Any]:
    """For an actor's options. Empty where each process starts by itself."""
    environment = ray.get_runtime_context().runtime_env
    if not config.ray.fork_workers or any(environment.get(field) for field in _DECIDES_THE_PYTHON):
        return {}
    python = shlex.quote(sys.executable)
    client = shlex.join([sys.executable, "-I", "-S", fork_client.__file__])
    # Ray has a shell read this. A node that has its Python elsewhere takes the one in its path.
    return {"py_executable": f"$(test -x {python} && echo {client} || echo python)"}
