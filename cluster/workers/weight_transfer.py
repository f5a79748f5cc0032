"""Experts' weights from one shard's process to another's, while both serve."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from experts.slots import ExpertSlots, Fill
from octet.errors import LaneError
from router.channel import WireChannel

Expert = tuple[int, int]
"""Layer and logical expert."""


def lend(slots: ExpertSlots, experts: Sequence[Expert], channel: WireChannel, bytes_per_s: float | None) -> None:
    """Send experts in this order, at most so fast; one that is not held (any more) is answered with "gone".

    Raises: LaneError.
    """
    for layer, expert in experts:
        begun_s = time.monotonic()
        held = slots.export(layer, expert)
        channel.send(None if held is None else torch.cat([part.reshape(-1) for part in held]))
        if bytes_per_s is not None:
            # What is moved must not crowd out what is served.
            time.sleep(max(0.0, begun_s + slots.expert_bytes / bytes_per_s - time.monotonic()))


def borrow(
    slots: ExpertSlots, fills: Sequence[Fill], channel: WireChannel, note: Callable[[int], None] = lambda count: None
) -> list[Fill]:
    """Fill slots with what `lend` sends. Returns: the fills that did not come, for another source.

    Args:
        note: told after each expert how many bytes came.
    """
    missing: list[Fill] = []
    for number, fill in enumerate(fills):
        try:
            received = channel.receive(slots.expert_bytes)
        except LaneError:
            return [*missing, *fills[number:]]
        if received is None:
            missing.append(fill)
            continue
        gate_up, down = slots.expert_shapes(fill.layer)
        weights = received.view(slots.gate_up[fill.layer].dtype)
        slots.adopt(fill, weights[: gate_up.numel()], weights[gate_up.numel() : gate_up.numel() + down.numel()])
        note(slots.expert_bytes)
    return missing


def parts_of(fills: Sequence[Fill], most: int) -> list[list[Fill]]:
    """Parts of so many experts at most, each with all slots of an expert, which is read once for them."""
    by_expert: dict[Expert, list[Fill]] = {}
    for fill in fills:
        by_expert.setdefault((fill.layer, fill.expert), []).append(fill)
    slots = list(by_expert.values())
    return [[fill for each in slots[i : i + most] for fill in each] for i in range(0, len(slots), most)]
