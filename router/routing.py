"""What attention workers route by: which shards there are, and what each of them holds."""

from __future__ import annotations

import dataclasses

from octet.ids import Epoch, WorkerId
from router.placement import Placement


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """One state of the expert pool. A worker goes from one to the next between two steps, as a whole."""

    epoch: Epoch
    """Grows with every change of the shards; the placement's version with every change of what they hold."""
    shards: tuple[WorkerId, ...]
    """In the order of the placement's."""
    placement: Placement
    shunned: frozenset[WorkerId] = frozenset()
    """Shards that are asked only for experts that nobody else holds."""

    @property
    def asked(self) -> Placement:
        """The placement as workers route by it."""
        return self.placement.without([self.shards.index(shard) for shard in self.shunned])

    def held_by(self, shard: WorkerId) -> dict[int, list[int]]:
        """The logical expert of each slot of a shard, by layer."""
        rows = self.placement.held_by(self.shards.index(shard)).tolist()
        return dict(zip(self.placement.layers, rows, strict=True))
