"""Which rows go to which shard: each token once per shard that holds at least one of its experts.

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `U` rows sent to one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType

import torch

from router.placement import EMPTY, Placement


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """What one shard is asked for."""

    rows_U: torch.Tensor
    """The tokens sent, ascending."""
    slots_UK: torch.Tensor
    """int32 slots within the shard; EMPTY where the expert is elsewhere."""
    weights_UK: torch.Tensor
    """fp32; 0 where the slot is EMPTY."""


@functools.cache
def plan_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("router.plan_cpu")


class Planner:
    """Plans dispatches of one placement. Made ready when it is built: no request waits for a compiler."""

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self._num_shards, self._slots_per_shard = placement.num_shards, placement.slots_per_shard
        if device.type == "cpu":
            plan_cpu().warm_up()
        self._physical = {
            layer: torch.tensor(placement.logical_to_physical[index], device=device)
            for index, layer in enumerate(placement.layers)
        }
        self._replicas = {
            layer: torch.tensor(placement.num_replicas[index], device=device)
            for index, layer in enumerate(placement.layers)
        }

    def plan(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> list[ShardPlan | None]:
        """One entry per shard, None where no token goes. Replicas of an expert take its tokens in turn."""
        if expert_ids_TK.device.type == "cpu":
            return self._plan_on_cpu(layer, expert_ids_TK, weights_TK)
        physical_ER = self._physical[layer]
        if physical_ER.shape[1] == 1:
            slots_TK = physical_ER[:, 0][expert_ids_TK]
        else:
            turn_T1 = torch.arange(len(expert_ids_TK), device=expert_ids_TK.device).unsqueeze(1)
            slots_TK = physical_ER[expert_ids_TK, turn_T1 % self._replicas[layer][expert_ids_TK]]
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
        return plans

    def _plan_on_cpu(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> list[ShardPlan | None]:
        """The same in one compiled pass: thirty small operators cost more than the plan itself."""
        counts, rows_XT, slots_XTK, weights_XTK = plan_cpu().plan_rows(
            expert_ids_TK.numpy(),
            weights_TK.numpy(),
            self._physical[layer].numpy(),
            self._replicas[layer].numpy(),
            self._num_shards,
            self._slots_per_shard,
        )
        return [
            None
            if count == 0
            else ShardPlan(
                rows_U=torch.from_numpy(rows_XT[shard, :count]),
                slots_UK=torch.from_numpy(slots_XTK[shard, :count]),
                weights_UK=torch.from_numpy(weights_XTK[shard, :count]),
            )
            for shard, count in enumerate(counts)
        ]
