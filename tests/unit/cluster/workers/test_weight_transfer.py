"""What becomes of weights that another shard was to lend."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from cluster.workers.weight_transfer import borrow
from experts.slots import Fill
from octet.errors import PeerLostError

LAYER, BYTES = 3, 24


class Slots:
    """Of experts of 2 × 2 and 2 × 1 numbers."""

    expert_bytes = BYTES

    def __init__(self) -> None:
        self.gate_up = {LAYER: torch.zeros(1)}
        self.adopted: list[tuple[Fill, list[float], list[float]]] = []

    def expert_shapes(self, layer: int) -> tuple[torch.Size, torch.Size]:
        return torch.Size([2, 2]), torch.Size([2, 1])

    def adopt(self, fill: Fill, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self.adopted.append((fill, gate_up.tolist(), down.tolist()))


class Channel:
    """From a lender that no longer has some experts, and is lost before one of them."""

    def __init__(self, gone: set[int], lost_at: int) -> None:
        self.gone, self.lost_at, self.number = gone, lost_at, -1

    def receive(self, payload_bytes: int) -> torch.Tensor | None:
        assert payload_bytes == BYTES
        self.number += 1
        if self.number == self.lost_at:
            raise PeerLostError("it has ended")
        weights = torch.arange(6, dtype=torch.float32) + 10 * self.number
        return None if self.number in self.gone else weights.view(torch.uint8)


@pytest.mark.parametrize("lost_at", [0, 1, 5, 8])
def test_every_slot_is_filled_or_left_to_another_source(lost_at: int) -> None:
    """One that is neither would be asked for an expert that it does not hold."""
    fills = [Fill(layer=LAYER, slot=slot, expert=slot + 7) for slot in range(8)]
    gone = set(random.sample(range(8), 3))
    slots, came = Slots(), list[int]()
    any_slots: Any = slots
    any_channel: Any = Channel(gone, lost_at)
    missing = borrow(any_slots, fills, any_channel, came.append)
    filled = [number for number in range(lost_at) if number not in gone]
    assert [one for one, _, _ in slots.adopted] == [fills[number] for number in filled]
    assert missing == [fills[number] for number in range(8) if number not in filled]
    assert came == [BYTES] * len(filled)
    for number, (_, gate_up, down) in zip(filled, slots.adopted, strict=True):
        assert gate_up + down == [10.0 * number + part for part in range(6)]
