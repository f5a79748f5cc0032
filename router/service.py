"""The router service: the one owner of the live placement, and of what the shards tell about their load.

Shapes: `L` mixture-of-experts layers, `E` logical experts, `S` slots of one shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from octet.ids import Epoch
from router.placement import EMPTY, Placement


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """Tokens of one layer since the cluster started."""

    layer: int
    tokens_E: tuple[int, ...]
    balancedness: float
    """Mean over shards ÷ maximum over shards; 0 before any traffic."""


class RouterService:
    """Holds placement and epoch; turns the shards' counts by slot into counts by expert."""

    def __init__(self, placement: Placement, epoch: Epoch) -> None:
        self.placement, self.epoch = placement, epoch
        self._counts: dict[int, Mapping[int, npt.NDArray[np.int64]]] = {}

    def record(self, shard: int, counts: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Take a shard's counts `[S]` by layer; they only ever grow, so the newest replaces the last."""
        self._counts[shard] = counts

    def layer_loads(self) -> list[LayerLoad]:
        return [self._load(index, layer) for index, layer in enumerate(self.placement.layers)]

    def _load(self, index: int, layer: int) -> LayerLoad:
        placement = self.placement
        tokens_E = np.zeros(placement.num_experts, dtype=np.int64)
        by_shard = np.zeros(placement.num_shards, dtype=np.int64)
        for shard, counts in self._counts.items():
            held_S, counts_S = placement.held_by(shard)[index], counts[layer]
            np.add.at(tokens_E, held_S[held_S != EMPTY], counts_S[held_S != EMPTY])
            by_shard[shard] = counts_S.sum()
        busiest = int(by_shard.max())
        balancedness = float(by_shard.mean()) / busiest if busiest else 0.0
        return LayerLoad(layer=layer, tokens_E=tuple(tokens_E.tolist()), balancedness=balancedness)
