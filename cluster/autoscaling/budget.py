"""Makes the targets of all pools fit one budget of GPUs: pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.members import POOLS, Pool


def fit(
    sizes: Mapping[Pool, int],
    draining: Mapping[Pool, int],
    targets: Mapping[Pool, int],
    minima: Mapping[Pool, int],
    gpus: Mapping[Pool, float],
    max_gpus: float | None,
) -> tuple[dict[Pool, int], frozenset[Pool]]:
    """The targets granted, and the pools that got less than they asked for.

    What a pool has, it keeps: only growth competes, member by member, and each goes to the pool that has the smallest
    part of what it asked for (D'Hondt's highest averages). A pool that shrinks gives its GPUs back once its members
    are gone, and not before. If the pools are larger than the budget as they are, the pool with the most above its
    minimum gives.

    Args:
        sizes: members that serve, start or are promised.
        draining: members that hold their GPUs until they are gone.
        gpus: per member.
    """
    if max_gpus is None:
        return dict(targets), frozenset()
    granted = {pool: min(sizes[pool], targets[pool]) for pool in POOLS}
    kept = sum(granted[pool] * gpus[pool] for pool in POOLS)
    while kept > max_gpus and (givers := [pool for pool in POOLS if granted[pool] > minima[pool]]):
        giver = max(givers, key=lambda pool: granted[pool] / max(minima[pool], 1))
        granted[giver] -= 1
        kept -= gpus[giver]
    free = max_gpus - sum((sizes[pool] + draining[pool]) * gpus[pool] for pool in POOLS)
    while takers := [pool for pool in POOLS if granted[pool] < targets[pool] and gpus[pool] <= free]:
        taker = min(takers, key=lambda pool: (granted[pool] + 1) / targets[pool])
        granted[taker] += 1
        free -= gpus[taker]
    return granted, frozenset(pool for pool in POOLS if granted[pool] < targets[pool])
