"""A cluster of the harness's own, on a Ray of its own."""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence

from cluster.launch import Report, RunningCluster, launch
from octet.config import load_config

SIZES = ("pools.prefill.size=2", "pools.decode.size=2", "pools.experts.size=3")
"""With somebody to go on, whoever dies, and shards that hold their experts alone."""
FIELDS = (
    "frontend.port=0",
    "kv.memory_gib=0.05",
    # On a machine that others use as well, a member may take so long to come the first time.
    "lane.connect_s=30",
    "chaos.enabled=true",
)


@contextlib.contextmanager
def own_cluster(
    model_dir: pathlib.Path | None, overrides: Sequence[str] = (), report: Report = lambda progress: None
) -> Iterator[RunningCluster]:
    """Serves as long as the context is open. Raises: ConfigError, CheckpointError, StartupError."""
    with tempfile.TemporaryDirectory(prefix="octet-chaos-") as directory:
        own = [f"ray.namespace=octet-{uuid.uuid4().hex[:8]}", f"chaos.audit_dir={directory}", *FIELDS, *SIZES]
        if model_dir is not None:
            own.append(f"model.path={model_dir}")
        cluster = launch(load_config(overrides=[*own, *overrides]), report)
        try:
            yield cluster
        finally:
            cluster.stop(drain=False)
