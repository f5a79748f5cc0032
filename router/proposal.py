"""What the router service proposes: the next routing by the loads that it sees, with what it costs and gains."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from octet.config import BalancingConfig
from octet.ids import Epoch, WorkerId
from router.balancing.measure import balancedness, shard_loads
from router.balancing.topology import Budget
from router.routing import Routing
from router.transition import Transition, propose, shard_slots


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A transition, and what it does to the loads that it is judged by."""

    transition: Transition
    num_bytes: int
    """To be moved."""
    balancedness: tuple[float, float]
    """Mean over layers, before and after, where replicas share their expert's load."""
    relative_gain: float
    """What it takes off the fullest shards' loads, summed over the layers, as a part of that sum."""

    def pays(self, min_gain: float) -> bool:
        """Whether it moves experts that have to move, or takes at least this part off the fullest shards' loads."""
        return bool(self.transition.fills) and (self.transition.needed or self.relative_gain >= min_gain)

    @property
    def summary(self) -> str:
        before, after = self.balancedness
        return (
            f"{len(self.transition.fills)} experts ({self.num_bytes / 2**20:.1f} MiB) move, balancedness "
            f"{before:.3f} → {after:.3f}, {self.relative_gain:.1%} off the fullest shards"
        )


def make_proposal(
    current: Routing,
    epoch: Epoch,
    loads_LE: npt.NDArray[np.float64],
    config: BalancingConfig,
    num_redundant: int,
    expert_bytes: int,
    *,
    joining: Sequence[WorkerId] = (),
    leaving: Collection[WorkerId] = (),
    lost: Collection[WorkerId] = (),
    resized: bool = False,
    judged_LE: npt.NDArray[np.float64] | None = None,
    domains: Mapping[WorkerId, int] | None = None,
) -> Proposal:
    """Plan with the balancer. Where shards come or go, only what has to move moves, and a later plan levels the rest.

    Args:
        resized: `num_redundant` is another one: as many slots may be filled as come or go, if `config` allows fewer.
        judged_LE: loads that say what the plan brings, `loads_LE` if not given. By the loads that it was made for,
            a plan always brings something, be it for their noise alone.
        domains: see `propose`.

    Raises: ConfigError if the shards that stay lack room.
    """
    reshaping = bool(joining or leaving or lost)
    num_filled = int((current.placement.physical_to_logical >= 0).sum())
    max_moves = config.max_moves if config.max_moves is not None else num_filled // 10
    if resized:
        num_slots = sum(shard_slots(current.placement.num_experts, num_redundant, len(current.shards)))
        max_moves = max(max_moves, abs(len(current.placement.layers) * num_slots - num_filled))
    judged_LE = loads_LE if judged_LE is None else judged_LE
    transition = propose(
        current,
        loads_LE,
        epoch=epoch,
        num_redundant=num_redundant,
        budget=Budget(max_moves=0 if reshaping else max_moves),
        joining=joining,
        leaving=leaving,
        lost=lost,
        domains=domains,
        # A second copy can wait until everything serves again.
        min_domains=2 if config.two_domains and not lost else 1,
    )
    before_LX, after_LX = (shard_loads(r.placement, judged_LE) for r in (current, transition.target))
    before, after = float(before_LX.max(1).sum()), float(after_LX.max(1).sum())
    return Proposal(
        transition=transition,
        num_bytes=len(transition.fills) * expert_bytes,
        balancedness=(float(balancedness(before_LX).mean()), float(balancedness(after_LX).mean())),
        relative_gain=(before - after) / before if before else 0.0,
    )
