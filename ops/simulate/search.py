"""The cheapest fixed sizes that keep enough requests within their targets."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from octet.errors import ConfigError
from ops.simulate.outcome import Run, summarized

if TYPE_CHECKING:
    from ops.simulate.command import Scenario

_POOLS = ("experts", "decode", "prefill")
_MOST_DOUBLINGS = 6
_PASSES = 2


def search_fixed(scenario: Scenario, start: dict[str, int], attainment: float) -> tuple[dict[str, int], Run]:
    """Doubles all pools until enough requests keep their targets; then makes one after the other as small as it can be
    with the others as they are, until none can be smaller.

    That is a local minimum: another division between pools may be as cheap or a little cheaper.

    Raises: ConfigError if no size is large enough.
    """
    known: dict[tuple[int, ...], tuple[float, Run]] = {}

    def judged(sizes: dict[str, int]) -> tuple[float, Run]:
        key = tuple(sizes[pool] for pool in _POOLS)
        if key not in known:
            run = scenario.run(sizes, autoscale=False)
            known[key] = summarized(run, 0.0).slo_attainment, run
            print(f"{sizes}: {known[key][0]:.2%}", file=sys.stderr)
        return known[key]

    sizes = dict(start)
    for _ in range(_MOST_DOUBLINGS):
        if judged(sizes)[0] >= attainment:
            break
        sizes = {pool: size * 2 for pool, size in sizes.items()}
    else:
        raise ConfigError("--search-fixed", f"{judged(sizes)[0]:.2%} with {sizes}", f"a load of which {attainment:.0%} "
                          "can be served in time", "loosen autoscaler.target_* or lower --attainment")  # fmt: skip
    least = {"prefill": 1, "decode": 1, "experts": scenario.least_shards}
    for _ in range(_PASSES):
        before = dict(sizes)
        for pool in _POOLS:
            low, high, step = least[pool], sizes[pool], 1
            # Steps that double, until one is too far; then between the last two.
            while low < high:
                smaller = max(low, high - step) if step else (low + high) // 2
                if judged({**sizes, pool: smaller})[0] >= attainment:
                    high, step = smaller, 2 * step
                else:
                    low, step = smaller + 1, 0
            sizes[pool] = high
        if sizes == before:
            break
    return sizes, judged(sizes)[1]
