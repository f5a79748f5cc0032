"""The mixture-of-experts layer as an attention worker sees it.

Shapes: `T` tokens, `H` hidden, `U` rows sent to one shard.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Mapping

import torch

from model.config import ModelConfig
from model.weights import GateWeights
from octet.errors import LaneError
from octet.faults import reach
from router.exchange import Exchange, ExpertRows, Ticket
from router.gate import Gate
from router.plan import Planner, ShardPlan


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatched:
    """The receipt of a dispatch: what `combine` needs to put the rows back."""

    x_TH: torch.Tensor
    plans: list[ShardPlan | None]
    ticket: Ticket


class RoutedExperts:
    """gate → plan → dispatch, then combine. Between the two the caller computes what does not need the experts."""

    def __init__(self, config: ModelConfig, gates: Mapping[int, GateWeights]) -> None:
        self._gates = {layer: Gate(weights, config) for layer, weights in gates.items()}
        self._planner: Planner | None = None
        self._exchange: Exchange | None = None
        self._under_way: collections.deque[Ticket] = collections.deque()
        self.combine_s = 0.0
        """Spent waiting for the experts' sums, since the start."""

    def adopt(self, planner: Planner, exchange: Exchange) -> None:
        """Route by this placement over this lane from now on. Between two steps, by the thread that takes them."""
        assert not self._under_way, "no step is under way"
        self._planner, self._exchange = planner, exchange

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Dispatched:
        """Raises: LaneError."""
        assert self._planner is not None, "adopt comes first"
        assert self._exchange is not None
        expert_ids_TK, weights_TK = self._gates[layer].select(x_TH)
        plans = self._planner.plan(layer, expert_ids_TK, weights_TK)
        rows = [
            None
            if plan is None
            else ExpertRows(x_UH=x_TH[plan.rows_U], slots_UK=plan.slots_UK, weights_UK=plan.weights_UK)
            for plan in plans
        ]
        reach("dispatch")
        ticket = self._exchange.send(layer, rows)
        self._under_way.append(ticket)
        return Dispatched(x_TH, plans, ticket)

    def combine(self, dispatched: Dispatched) -> torch.Tensor:
        """The sum over shards, `[T, H]` in fp32. Raises: LaneError."""
        assert self._exchange is not None, "adopt comes first"
        ticket = self._under_way.popleft()
        assert ticket is dispatched.ticket, "combined in the order of the dispatches"
        begun_s = time.perf_counter()
        reach("combine")
        replies = self._exchange.receive(ticket)
        self.combine_s += time.perf_counter() - begun_s
        y_TH = torch.zeros(dispatched.x_TH.shape, dtype=torch.float32, device=dispatched.x_TH.device)
        for plan, y_UH in zip(dispatched.plans, replies, strict=True):
            if plan is not None and y_UH is not None:
                y_TH.index_add_(0, plan.rows_U, y_UH.float())
        return y_TH

    def drain(self) -> None:
        """Drop what is still under way after a step has failed, so that the exchange can be used again if it works."""
        while self._under_way and self._exchange is not None:
            # What becomes of it does not matter; an exchange that is broken will say so at its next use.
            with contextlib.suppress(LaneError):
                self._exchange.receive(self._under_way.popleft())
