"""Nodes for pools that grow, on a Ray cluster with an autoscaler of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import ray.autoscaler.sdk

from cluster.members import POOLS
from octet.config import PoolsConfig

_LEAST_CPUS = 0.0001
"""A bundle may not be empty; this is Ray's smallest share."""


def bundles(pools: PoolsConfig, sizes: Mapping[str, int]) -> list[dict[str, float]]:
    """What every member of pools of these sizes holds of a node."""
    wanted: list[dict[str, float]] = []
    for name in POOLS:
        pool = getattr(pools, name)
        held = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
        bundle = {resource: amount for resource, amount in held.items() if amount > 0}
        wanted += [bundle or {"CPU": _LEAST_CPUS}] * sizes.get(name, 0)
    return wanted


async def want_nodes(pools: PoolsConfig, sizes: Mapping[str, int]) -> None:
    """Ask Ray's autoscaler for nodes on which all of these members fit at once, whatever runs on them already.

    A request stands until the next one takes its place: nodes beyond it go once they are idle. On a cluster without an
    autoscaler nothing comes of it.
    """
    await asyncio.to_thread(ray.autoscaler.sdk.request_resources, bundles=bundles(pools, sizes))
