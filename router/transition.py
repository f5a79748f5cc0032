"""From one state of the expert pool to the next: which slots are filled before it is adopted, which emptied after.

Shapes: `L` mixture-of-experts layers, `E` logical experts, `X` shards, `C` slots per shard.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from octet.errors import ConfigError
from octet.ids import Epoch, WorkerId
from router.balancing.topology import Budget, Topology
from router.placement import EMPTY, Placement, from_physical
from router.routing import Routing

if TYPE_CHECKING:
    from router.balancing.planner import Move


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlotFill:
    """One slot of a shard and what it is to hold."""

    shard: WorkerId
    layer: int
    slot: int
    """Within the shard."""
    expert: int
    source: WorkerId | None
    """A shard that holds the expert now; None where it has to come from the checkpoint."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """Prepare `fills`, adopt `target`, then retire what it does not hold."""

    target: Routing
    fills: tuple[SlotFill, ...]
    gain: float
    """What the layers' largest shard loads fall by, in all, per window of the loads that it was planned for."""
    needed: bool = False
    """Whether it places experts that would be lost, or on fewer nodes than is asked for: not made for gain."""
    reason: str


def shard_slots(
    num_experts: int, num_redundant: int, num_shards: int, draining: Collection[int] = ()
) -> tuple[int, ...]:
    """Slots per layer that each shard offers: experts and redundant ones shared evenly among those that stay.

    Raises: ConfigError if no shard stays.
    """
    staying = [shard for shard in range(num_shards) if shard not in draining]
    if not staying:
        raise ConfigError("pools.experts.size", 0, "a shard to hold the experts")
    # More than one replica of an expert on a shard would serve no purpose.
    total = min(num_experts + num_redundant, num_experts * len(staying))
    share, rest = divmod(total, len(staying))
    slots = [0] * num_shards
    for number, shard in enumerate(staying):
        slots[shard] = share + (number < rest)
    return tuple(slots)


def with_capacity(placement: Placement, capacity: int) -> Placement:
    """The same placement with `capacity` slots per shard, those behind its own empty."""
    old_LXS = placement.physical_to_logical.reshape(len(placement.layers), placement.num_shards, -1)
    new_LXC = np.full((*old_LXS.shape[:2], capacity), EMPTY, dtype=np.int32)
    new_LXC[:, :, : old_LXS.shape[2]] = old_LXS
    return _of_slots(new_LXC, placement, placement.version)


def compact(placement: Placement) -> Placement:
    """What the balancer plans with: every shard's experts in its first slots, and no more slots than are held."""
    held_LXC = _slots(placement)
    order = np.argsort(held_LXC == EMPTY, axis=2, kind="stable")
    most = int((held_LXC != EMPTY).sum(2).max(initial=1))
    packed_LXS = np.take_along_axis(held_LXC, order, axis=2)[:, :, :most]
    return _of_slots(packed_LXS, placement, placement.version)


def propose(
    current: Routing,
    loads_LE: npt.ArrayLike,
    *,
    epoch: Epoch,
    num_redundant: int,
    budget: Budget,
    joining: Sequence[WorkerId] = (),
    leaving: Collection[WorkerId] = (),
    lost: Collection[WorkerId] = (),
    domains: Mapping[WorkerId, int] | None = None,
    min_domains: int = 1,
) -> Transition:
    """The next state of the expert pool: the balancer's, over the shards that there will be.

    Only slots that are free now are filled. Where the shards stay the same, a plan is made of what fits.

    Args:
        loads_LE: load of each logical expert per window.
        epoch: of the target, if its shards are others.
        num_redundant: slots per layer beyond one for each expert, over all shards.
        joining: shards that hold nothing yet.
        leaving: shards whose experts go elsewhere; they lend them meanwhile.
        lost: shards that leave and can lend nothing.
        domains: the failure domain, such as the node, of each shard; each is one of its own if not given.

    Raises: ConfigError if the shards that stay lack room.
    """
    shards = (*current.shards, *joining)
    gone = {*leaving, *lost}
    placement = current.placement
    slots = shard_slots(
        placement.num_experts, num_redundant, len(shards), [index for index, s in enumerate(shards) if s in gone]
    )
    numbers = {} if domains is None else {domain: number for number, domain in enumerate(sorted(set(domains.values())))}
    topology = Topology(
        slots=slots,
        nodes=() if domains is None else tuple(numbers[domains[shard]] for shard in shards),
        min_domains=min_domains,
    )
    # Experts without any load yet are placed as if they had a little, all the same.
    loads_LE = np.asarray(loads_LE, dtype=np.float64)
    loads_LE = loads_LE + 1e-3 * max(float(loads_LE.mean()), 1.0)
    # Imported here, so that the many who only know of transitions do without compiled loops.
    from router.balancing.planner import plan

    free_LX = _free(placement, len(shards))
    wanted, moves, reason = plan(loads_LE, topology, budget, compact(placement), free_LX=free_LX)
    reshaped = bool(joining or gone)
    left_L = np.zeros(len(placement.layers), dtype=np.bool_)
    if not reshaped:
        left_L = ((_holds(wanted) & ~_holds(placement)).sum(2) > free_LX).any(1)
        if left_L.any():
            layers = "1 layer" if left_L.sum() == 1 else f"{left_L.sum()} layers"
            reason += f"; too few slots are free in {layers}, left as before"
        elif not moves and not free_LX.any():
            reason = (
                f"no slot is free to move an expert into: all {placement.slots_per_shard} of every shard are filled "
                "(pools.experts.slots_per_shard)"
            )
    return _settled(current, epoch, shards, wanted, left_L, gone, lost, reason, moves)


def _settled(
    current: Routing,
    epoch: Epoch,
    shards: Sequence[WorkerId],
    wanted: Placement,
    left_L: npt.NDArray[np.bool_],
    gone: Collection[WorkerId],
    lost: Collection[WorkerId],
    reason: str,
    moves: Sequence[Move],
) -> Transition:
    """A plan of the balancer without moving what can stay.

    An expert that a shard keeps stays in its slot; new ones go to slots that are free now, as what leaves is still
    asked for until the target is adopted. Layers in `left_L` stay as they are.
    """
    placement = current.placement
    capacity = placement.slots_per_shard
    held_LXC = _slots(placement)
    index_of = {shard: index for index, shard in enumerate(current.shards)}
    staying = [shard for shard in shards if shard not in gone]
    target_LXC = np.full((len(placement.layers), len(staying), capacity), EMPTY, dtype=np.int32)
    lenders = _Lenders(current, lost)
    fills: list[SlotFill] = []
    for number, shard in enumerate(staying):
        wanted_LS = wanted.held_by(shards.index(shard))
        for index, layer in enumerate(placement.layers):
            old_C = held_LXC[index, index_of[shard]] if shard in index_of else np.full(capacity, EMPTY, np.int32)
            wanted_C = old_C if left_L[index] else wanted_LS[index]
            experts = wanted_C[wanted_C != EMPTY]
            keeps_C = np.isin(old_C, experts)
            target_LXC[index, number, keeps_C] = old_C[keeps_C]
            missing = np.setdiff1d(experts, old_C).tolist()
            free = np.flatnonzero(old_C == EMPTY)[: len(missing)].tolist()
            if len(free) < len(missing):
                raise ConfigError(
                    "pools.experts.slots_per_shard",
                    f"{len(free)} free of {capacity} slots of {shard} in layer {layer}",
                    f"{len(missing)} to move experts into while the others serve",
                    "give shards more slots",
                )
            for slot, expert in zip(free, missing, strict=True):
                target_LXC[index, number, slot] = expert
                source = lenders.of(index, expert)
                fills.append(SlotFill(shard=shard, layer=layer, slot=slot, expert=expert, source=source))
    reshaped = tuple(staying) != current.shards
    version = placement.version + int(reshaped or not np.array_equal(target_LXC, held_LXC))
    target = Routing(
        epoch=epoch if reshaped else current.epoch,
        shards=tuple(staying),
        placement=_of_slots(target_LXC, placement, version),
    )
    left = {layer for layer, stays in zip(placement.layers, left_L, strict=True) if stays}
    gains = [move.gain for move in moves if move.layer not in left]
    return Transition(
        target=target,
        fills=tuple(fills),
        gain=sum(gain for gain in gains if gain < math.inf),
        needed=math.inf in gains,
        reason=reason,
    )


def missing_experts(routing: Routing, lost: Collection[WorkerId]) -> list[tuple[int, int]]:
    """(layer, expert) of all that nobody holds once these shards are gone."""
    held_LXC = _slots(routing.placement)
    stays_X = np.array([shard not in lost for shard in routing.shards])
    missing = []
    for index, layer in enumerate(routing.placement.layers):
        left = np.unique(held_LXC[index, stays_X])
        missing += [(layer, int(e)) for e in np.setdiff1d(np.arange(routing.placement.num_experts), left)]
    return missing


class _Lenders:
    """Spreads the experts to be copied over the shards that hold them."""

    def __init__(self, current: Routing, lost: Collection[WorkerId]) -> None:
        self._current, self._lost = current, lost
        self._lent: Counter[WorkerId] = Counter()

    def of(self, index: int, expert: int) -> WorkerId | None:
        placement = self._current.placement
        physical_R = placement.logical_to_physical[index, expert]
        holders = {self._current.shards[slot // placement.slots_per_shard] for slot in physical_R if slot != EMPTY}
        able = sorted(holders - set(self._lost))
        if not able:
            return None
        chosen: WorkerId = min(able, key=lambda shard: self._lent[shard])
        self._lent[chosen] += 1
        return chosen


def _free(placement: Placement, num_shards: int) -> npt.NDArray[np.int64]:
    """Slots `[L, X]` without an expert; those of shards beyond the placement's all are."""
    free_LX = np.full((len(placement.layers), num_shards), placement.slots_per_shard)
    free_LX[:, : placement.num_shards] -= (_slots(placement) != EMPTY).sum(2)
    return free_LX


def _holds(placement: Placement) -> npt.NDArray[np.bool_]:
    """Whether each shard holds each expert, `[L, X, E]`."""
    held_LXC = _slots(placement)
    holds_LXE = np.zeros((*held_LXC.shape[:2], placement.num_experts), dtype=np.bool_)
    layer_of, shard_of, slot_of = (held_LXC != EMPTY).nonzero()
    holds_LXE[layer_of, shard_of, held_LXC[layer_of, shard_of, slot_of]] = True
    return holds_LXE


def _slots(placement: Placement) -> npt.NDArray[np.int32]:
    """`[L, X, C]`."""
    return placement.physical_to_logical.reshape(len(placement.layers), placement.num_shards, -1)


def _of_slots(held_LXC: npt.NDArray[np.int32], like: Placement, version: int) -> Placement:
    num_layers, num_shards, _ = held_LXC.shape
    flat = np.ascontiguousarray(held_LXC.reshape(num_layers, -1))
    return from_physical(flat, like.layers, like.num_experts, num_shards, version)
