"""Which rows go to which shard: each token once per shard that holds at least one of its experts.

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `U` rows sent to one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

from router.placement import EMPTY, Placement

if TYPE_CHECKING:
    from router.plan_cpu import Replicas


ShardArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""A `ShardPlan` as arrays."""


class DispatchPlan(Protocol):
    """One layer's rows, divided among the shards."""

    def of(self, shard: int) -> ShardPlan | None:
        """None where no token goes."""

    def arrays_of(self, shard: int) -> ShardArrays | None:
        """The same on a CPU."""


@dataclasses.dataclass(frozen=True, slots=True)
class PlanByShard:
    """A plan whose parts are made one by one."""

    shards: tuple[ShardPlan | None, ...]

    def of(self, shard: int) -> ShardPlan | None:
        return self.shards[shard]

    def arrays_of(self, shard: int) -> ShardArrays | None:
        part = self.shards[shard]
        return None if part is None else (part.rows_U.numpy(), part.slots_UK.numpy(), part.weights_UK.numpy())


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """What one shard is asked for."""

    rows_U: torch.Tensor
    """The tokens sent, ascending."""
    slots_UK: torch.Tensor
    """int32 slots within the shard; EMPTY where the expert is elsewhere."""
    weights_UK: torch.Tensor
    """fp32; 0 where the slot is EMPTY."""


FEW_ROWS = {"cpu": 8, "gpu": 64}
"""Rows per expert hit below which a shard waits for weights rather than for arithmetic. A CPU core reads an expert in
the time of about 8 more rows of it, a GPU in that of some hundreds; but there a shard merges frames of several."""


@functools.cache
def plan_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba where no expert has replicas.
    return importlib.import_module("router.plan_cpu")


class Planner:
    """Plans dispatches of one placement. Made ready when it is built: no request waits for a compiler."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._num_shards, self._slots_per_shard = placement.num_shards, placement.slots_per_shard
        self._few_rows = FEW_ROWS["cpu" if device.type == "cpu" else "gpu"]
        self._replicas: dict[int, Replicas] = {}
        if device.type == "cpu" or placement.num_replicas.max(initial=1) > 1:
            plan_cpu().warm_up()
            self._replicas = plan_cpu().replicas_of(placement)
        self._only_slot = {
            layer: torch.tensor(placement.logical_to_physical[index, :, 0], device=device)
            for index, layer in enumerate(placement.layers)
            if placement.num_replicas[index].max() == 1
        }

    def plan(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> DispatchPlan:
        """Which replica serves a row depends on this batch alone."""
        if expert_ids_TK.device.type == "cpu":
            return self._plan_on_cpu(layer, expert_ids_TK, weights_TK)
        return self._plan_on_gpu(layer, expert_ids_TK, weights_TK)

    def _plan_on_gpu(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> DispatchPlan:
        if layer in self._only_slot:
            slots_TK = self._only_slot[layer][expert_ids_TK]
        else:
            # To the host and back with 64 bytes a token: the choice is sequential, and takes microseconds there.
            ids_TK = expert_ids_TK.cpu().numpy()
            chosen_TK = plan_cpu().choose(ids_TK, self._replicas[layer], self._num_shards, self._few_rows)
            slots_TK = torch.from_numpy(chosen_TK).to(expert_ids_TK.device)
        shards_TK = slots_TK // self._slots_per_shard
        plans: list[ShardPlan | None] = []
        for shard in range(self._num_shards):
            here_TK = shards_TK == shard
            rows_U = here_TK.any(1).nonzero().squeeze(1)
            if len(rows_U) == 0:
                plans.append(None)
                continue
            here_UK = here_TK[rows_U]
            local_UK = slots_TK[rows_U] - shard * self._slots_per_shard
            plans.append(
                ShardPlan(
                    rows_U=rows_U,
                    slots_UK=local_UK.masked_fill(~here_UK, EMPTY).int(),
                    weights_UK=weights_TK[rows_U] * here_UK,
                )
            )
        return PlanByShard(tuple(plans))

    def _plan_on_cpu(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> DispatchPlan:
        """The same in one compiled pass: thirty small operators cost more than the plan itself."""
        plan: DispatchPlan = plan_cpu().plan_rows(
            expert_ids_TK.numpy(),
            weights_TK.numpy(),
            self._replicas[layer],
            self._num_shards,
            self._slots_per_shard,
            self._few_rows,
        )
        return plan
