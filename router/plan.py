"""Which rows go to which shard: each token once per shard that holds at least one of its experts.

Shapes: `T` tokens, `K` experts per token, `E` experts, `R` replicas, `X` shards, `U` rows sent to one shard.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from router.gate import FEW_TOKENS, Gate
from router.placement import EMPTY, Placement

if TYPE_CHECKING:
    from router.plan_cpu import Replicas


ShardArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]
"""A `ShardPlan` as arrays."""


class DispatchPlan(Protocol):
    """One layer's rows, divided among the shards."""

    def of(self, shard: int) -> ShardPlan | None:
        """None where no token goes."""

    def stacked(self) -> StackedPlan:
        """The same on a CPU."""


class StackedPlan(NamedTuple):
    """A plan as arrays: what shard `X` is sent stands in the first so many entries."""

    counts_X: npt.NDArray[np.int64]
    rows_XT: npt.NDArray[np.int64]
    slots_XTK: npt.NDArray[np.int32]
    weights_XTK: npt.NDArray[np.float32]

    @classmethod
    def make(cls, num_shards: int, num_tokens: int, top_k: int) -> StackedPlan:
        """Room for one, in which nobody is sent anything."""
        shape = num_shards, num_tokens, top_k
        return cls(
            np.zeros(num_shards, np.int64),
            np.empty(shape[:2], np.int64),
            np.empty(shape, np.int32),
            np.empty(shape, np.float32),
        )

    @classmethod
    def of_parts(cls, parts: Sequence[ShardPlan | None]) -> StackedPlan:
        sizes = [0 if part is None else len(part.slots_UK) for part in parts]
        top_k = max((part.slots_UK.shape[1] for part in parts if part is not None), default=0)
        plan = cls.make(len(parts), max(sizes, default=0), top_k)
        for shard, (part, size) in enumerate(zip(parts, sizes, strict=True)):
            if part is not None:
                plan.counts_X[shard] = size
                plan.rows_XT[shard, :size] = np.arange(size) if part.rows_U is None else part.rows_U.numpy()
                plan.slots_XTK[shard, :size] = part.slots_UK.numpy()
                plan.weights_XTK[shard, :size] = part.weights_UK.numpy()
        return plan

    def of(self, shard: int) -> ShardPlan | None:
        arrays = self.arrays_of(shard)
        if arrays is None:
            return None
        rows_U, slots_UK, weights_UK = map(torch.from_numpy, arrays)
        return ShardPlan(rows_U=rows_U, slots_UK=slots_UK, weights_UK=weights_UK)

    def arrays_of(self, shard: int) -> ShardArrays | None:
        count = int(self.counts_X[shard])
        if count == 0:
            return None
        return self.rows_XT[shard, :count], self.slots_XTK[shard, :count], self.weights_XTK[shard, :count]

    def stacked(self) -> StackedPlan:
        return self


@dataclasses.dataclass(frozen=True, slots=True)
class PlanByShard:
    """A plan whose parts are made one by one."""

    shards: tuple[ShardPlan | None, ...]

    def of(self, shard: int) -> ShardPlan | None:
        return self.shards[shard]

    def stacked(self) -> StackedPlan:
        return StackedPlan.of_parts(self.shards)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DensePlan:
    """Every token goes to every shard, which looks for what is its own: a plan whose sizes the host knows ahead."""

    slots_XTK: torch.Tensor
    """int32 slots within each shard `X`; EMPTY where the expert is elsewhere."""
    weights_TK: torch.Tensor

    def of(self, shard: int) -> ShardPlan:
        return ShardPlan(rows_U=None, slots_UK=self.slots_XTK[shard], weights_UK=self.weights_TK)

    def stacked(self) -> StackedPlan:
        return StackedPlan.of_parts([self.of(shard) for shard in range(len(self.slots_XTK))])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    """What one shard is asked for."""

    rows_U: torch.Tensor | None
    """The tokens sent, ascending; None for all of them."""
    slots_UK: torch.Tensor
    """int32 slots within the shard; EMPTY where the expert is elsewhere."""
    weights_UK: torch.Tensor
    """fp32; not looked at where the slot is EMPTY."""


FEW_ROWS = {"cpu": 16, "gpu": 64}
"""Rows per expert hit below which a shard waits for weights rather than for arithmetic. A CPU core reads an expert in
the time of about 16 more rows of it, a GPU in that of some hundreds; but there a shard merges frames of several."""


DENSE_ROWS = 512
"""Up to so many tokens, as decode steps have, GPUs send all of them to every shard. Who chooses would have to ask the
device, in every layer, how many go where; so the host is done with a step long before the device is, and can capture
it in a graph. With 8 of 160 experts 90% of the tokens go to each of 4 shards anyway, 66% to each of 8, 40% of 16."""


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
        self._placement, self._device = placement, device
        self._index = {layer: index for index, layer in enumerate(placement.layers)}
        if device.type != "cpu":
            # Computed here, and not in a step: what is made in inference mode `take_over` could not write to.
            _ = self._one_slot_LE

    def route(self, layer: int, gate: Gate, x_TH: torch.Tensor, real_T: torch.Tensor | None = None) -> DispatchPlan:
        """`plan` for what the gate selects. Few tokens, as decode steps have, take one compiled call on a CPU."""
        if gate.compiled is None or len(x_TH) > FEW_TOKENS:
            return self.plan(layer, *gate.select(x_TH), real_T)
        plan: DispatchPlan = plan_cpu().route_rows(
            x_TH.float().numpy(),
            gate.compiled,
            gate.top_k,
            self._replicas[layer],
            self._num_shards,
            self._slots_per_shard,
            self._few_rows,
        )
        return plan

    def plan(
        self,
        layer: int,
        expert_ids_TK: torch.Tensor,
        weights_TK: torch.Tensor,
        real_T: torch.Tensor | None = None,
    ) -> DispatchPlan:
        """Which replica serves a row depends on this batch alone.

        Args:
            real_T: false for tokens that only fill the batch up, and go to no expert; on GPUs, in small batches.
        """
        if expert_ids_TK.device.type == "cpu":
            assert real_T is None, "batches are filled up on GPUs"
            return self._plan_on_cpu(layer, expert_ids_TK, weights_TK)
        if len(expert_ids_TK) <= DENSE_ROWS:
            return self._plan_densely(layer, expert_ids_TK, weights_TK, real_T)
        assert real_T is None, "batches that are filled up are small"
        return self._plan_on_gpu(layer, expert_ids_TK, weights_TK)

    def take_over(self, before: Planner) -> bool:
        """Plan in the place of another, whose captured graphs find this one's slots where they found its own.

        Returns: whether that is so; shards that are other in number or in size are planned for otherwise.
        """
        alike = (before._num_shards, before._slots_per_shard) == (self._num_shards, self._slots_per_shard)
        if self._device.type == "cpu" or not alike:
            return False
        self._one_slot_LE = before._one_slot_LE.copy_(self._one_slot_LE)
        return True

    @functools.cached_property
    def _one_slot_LE(self) -> torch.Tensor:
        """One slot of every expert `[L, E]`, chosen so that shards read as many weights if all are hit."""
        every_E1 = np.arange(self._placement.num_experts)[:, None]
        chosen = [
            plan_cpu().choose(every_E1, self._replicas[layer], self._num_shards, self._few_rows)[:, 0]
            if self._has_choice(layer)
            else self._placement.logical_to_physical[index, :, 0]
            for index, layer in enumerate(self._placement.layers)
        ]
        return torch.tensor(np.stack(chosen), dtype=torch.int64, device=self._device)

    def _has_choice(self, layer: int) -> bool:
        return bool(self._placement.num_replicas[self._index[layer]].max() > 1)

    def _plan_densely(
        self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, real_T: torch.Tensor | None
    ) -> DensePlan:
        """Few rows are bound by weights, of which one replica is read, the same in every such batch."""
        slots_TK = self._one_slot_LE[self._index[layer]][expert_ids_TK]
        if real_T is not None:
            slots_TK = slots_TK.masked_fill(~real_T.unsqueeze(1), EMPTY)
        first_X11 = torch.arange(self._num_shards, device=slots_TK.device).view(-1, 1, 1) * self._slots_per_shard
        local_XTK = slots_TK.unsqueeze(0) - first_X11
        here_XTK = (local_XTK >= 0) & (local_XTK < self._slots_per_shard)
        return DensePlan(slots_XTK=torch.where(here_XTK, local_XTK, EMPTY).int(), weights_TK=weights_TK)

    def _plan_on_gpu(self, layer: int, expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor) -> DispatchPlan:
        if self._has_choice(layer):
            # To the host and back with 64 bytes a token: the choice is sequential, and takes microseconds there.
            ids_TK = expert_ids_TK.cpu().numpy()
            chosen_TK = plan_cpu().choose(ids_TK, self._replicas[layer], self._num_shards, self._few_rows)
            slots_TK = torch.from_numpy(chosen_TK).to(expert_ids_TK.device)
        else:
            slots_TK = self._one_slot_LE[self._index[layer]][expert_ids_TK]
        shards_TK = slots_TK // self._slots_per_shard
        here_XT = torch.stack([(shards_TK == shard).any(1) for shard in range(self._num_shards)])
        # All that the host has to know, asked for at once.
        counts_X: list[int] = here_XT.sum(1).tolist()
        rows_XU = here_XT.nonzero()[:, 1].split(counts_X)
        plans: list[ShardPlan | None] = []
        for shard, rows_U in enumerate(rows_XU):
            if len(rows_U) == 0:
                plans.append(None)
                continue
            local_UK = slots_TK[rows_U] - shard * self._slots_per_shard
            here_UK = shards_TK[rows_U] == shard
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
