"""Compile what runs on CPUs, once and in one process: `python -m ops.compile`.

Numba keeps what it has compiled beside the sources. When a checkout serves for the first time, the members of its
cluster would otherwise all compile the same at the same time, each on its share of the cores.
"""

from __future__ import annotations

import numpy as np

from cluster.planning import EMBEDDED_MODEL
from ops.local import LocalEngine, make_request
from router.balancing.planner import plan
from router.balancing.topology import Budget, Topology


def compile_kernels() -> None:
    """Serve a request with the embedded model, and plan placements of every kind."""
    engine = LocalEngine(EMBEDDED_MODEL, num_shards=2)
    try:
        engine.generate([make_request(range(3, 40), max_new_tokens=3) for _ in range(2)])
    finally:
        engine.close()
    loads_LE = np.random.default_rng(0).random((2, 8))
    first = plan(loads_LE, Topology(slots=(6, 6)), Budget(), None).placement
    plan(loads_LE[:, ::-1], Topology(slots=(6, 6, 6), min_domains=2), Budget(max_moves=4), first)


if __name__ == "__main__":
    compile_kernels()
