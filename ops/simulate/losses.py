"""Members that are lost in simulated time, as a hazard that is the same for all of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from cluster.members import POOLS

if TYPE_CHECKING:
    from ops.simulate.simulation import Simulation


class Losses:
    """Draws when, and who. What follows is the simulation's and the fleet's."""

    def __init__(self, simulation: Simulation, every_s: float, seed: int) -> None:
        self._simulation, self._every_s = simulation, every_s
        self._random = random.Random(seed)
        self.num_lost = 0

    def begin(self) -> None:
        self._simulation.clock.after(self._random.expovariate(1 / self._every_s), self._lose)

    def _lose(self) -> None:
        simulation, members = self._simulation, self._simulation.fleet.members
        serving = [(pool, number) for pool in POOLS for number in members.serving(pool)]
        if serving:
            pool, number = self._random.choice(serving)
            lose = {
                "prefill": simulation.lose_prefill,
                "decode": simulation.lose_decode,
                "experts": simulation.lose_shard,
            }[pool]
            lose(number)
            self.num_lost += 1
        self.begin()
