"""The expert shards in simulated time: their placement by the real balancer, and what a frame costs under it."""

from __future__ import annotations

import dataclasses

import numpy as np

from ops.simulate.costs import Costs
from ops.simulate.expert_loads import ExpertLoads
from ops.simulate.shape import Shape
from ops.simulate.shard_times import Batches, ShardTimes, sample_batches, shard_times
from router.balancing.measure import balancedness, shard_loads
from router.balancing.planner import Rebalance, plan
from router.balancing.topology import Budget, Topology
from router.placement import Placement, place_evenly
from router.plan import FEW_ROWS

_HORIZON_S = 600.0
"""For how long loads are taken to hold when moves are weighed against them."""
_MOST_MOVED = 0.1
"""Of all slots, in one rebalance."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExpertOptions:
    balance: bool
    """Plan placements from loads, and again when loads have drifted; otherwise experts stay where they are numbered."""
    gpu: bool
    most_tokens: int
    """Of one frame."""
    seed: int


class ExpertPool:
    """The placement that serves, and the loads that hold."""

    def __init__(
        self, loads: ExpertLoads, shape: Shape, costs: Costs, num_shards: int, redundant: int, options: ExpertOptions
    ) -> None:
        self._loads, self._shape, self._costs, self._options = loads, shape, costs, options
        self._window = 0
        self.asked_redundant = redundant
        """More come with it where shards have as many slots each."""
        self.placement = self.planned(num_shards, redundant)
        self._sampled: tuple[int, Batches] | None = None
        """The window that they are of, and batches."""
        self._look()

    @property
    def balances(self) -> bool:
        return self._options.balance

    @property
    def num_shards(self) -> int:
        return self.placement.num_shards

    @property
    def num_redundant(self) -> int:
        """Slots per layer beyond one for each expert, as far as they hold something."""
        return int((self.placement.physical_to_logical[0] >= 0).sum()) - self.placement.num_experts

    @property
    def loads_LE(self) -> np.ndarray:
        return self._loads.windows[self._window]

    def planned(self, num_shards: int, redundant: int) -> Placement:
        """A first placement on so many shards, each with as many slots."""
        layers = tuple(self._shape.moe_layers)
        if not self._options.balance:
            return place_evenly(layers, self._shape.num_experts, num_shards)
        slots = -(-(self._shape.num_experts + redundant) // num_shards)
        topology = Topology(slots=(slots,) * num_shards)
        return plan(self.loads_LE, topology, Budget(), None, layers).placement

    def drift(self, now_s: float) -> bool:
        """Go over to the loads of this time. Returns: whether they are others."""
        window = self._loads.index_at(now_s)
        changed, self._window = window != self._window, window
        if changed:
            self._look()
        return changed

    def rebalanced(self) -> Rebalance | None:
        """What the balancer would change now; None if nothing, or if it is not asked."""
        if not self._options.balance:
            return None
        slots = self.placement.slots_per_shard
        mean_load = self._shape.experts_per_token / self.num_shards
        budget = Budget(
            max_moves=int(_MOST_MOVED * self.placement.physical_to_logical.size),
            move_cost=mean_load * self._costs.slot_fill_s,
            horizon=_HORIZON_S,
        )
        found = plan(self.loads_LE, Topology(slots=(slots,) * self.num_shards), budget, self.placement)
        return found if found.moves else None

    def fill_s(self, num_moves: int) -> float:
        """All shards fill their slots at the same time, one after the other."""
        return num_moves / self.num_shards * self._costs.slot_fill_s

    def without_s(self, shard: int) -> float:
        """How long survivors take to fill slots with what only this shard has held."""
        held_LXS = self.placement.physical_to_logical.reshape(len(self.placement.layers), self.num_shards, -1)
        missing = 0
        for held_XS in held_LXS:
            others = np.delete(held_XS, shard, axis=0)
            missing += len(np.setdiff1d(held_XS[shard][held_XS[shard] >= 0], others))
        return missing / max(1, self.num_shards - 1) * self._costs.slot_fill_s

    def adopt(self, placement: Placement) -> None:
        self.placement = placement
        self._look()

    def _look(self) -> None:
        """What the placement that serves makes of the loads that hold."""
        options = self._options
        if self._sampled is None or self._sampled[0] != self._window:
            batches = sample_batches(self.loads_LE, self._shape.experts_per_token, options.most_tokens, options.seed)
            self._sampled = (self._window, batches)
        few_rows = FEW_ROWS["gpu" if options.gpu else "cpu"]
        self.times: ShardTimes = shard_times(self.placement, self._sampled[1], self._costs, few_rows)
        loads_LX = shard_loads(self.placement, self.loads_LE)
        self.level = float(balancedness(loads_LX).mean())
        # Lanes do not wait for each other, so which shard is full first is a matter of all layers together.
        self.fullest = float(1 / balancedness(loads_LX.sum(0, keepdims=True))[0])
