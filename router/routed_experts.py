"""The mixture-of-experts layer as an attention worker sees it.

Shapes: `T` tokens, `H` hidden.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from model.config import ModelConfig
from model.weights import GateWeights
from octet.errors import LaneError
from octet.faults import reach
from router.exchange import Exchange, Ticket
from router.gate import FEW_TOKENS, Gate
from router.plan import DispatchPlan, Planner


@dataclasses.dataclass(frozen=True, slots=True)
class Dispatched:
    """The receipt of a dispatch: what `combine` needs to put the rows back."""

    ticket: Ticket
    y_TH: torch.Tensor
    """Zeros in fp32, where the sums go."""


class RoutedExperts:
    """gate → plan → dispatch, then combine. Between the two the caller computes what does not need the experts."""

    def __init__(
        self,
        config: ModelConfig,
        gates: Mapping[int, GateWeights],
        competes: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            competes: whether cores that are left to shards would go to others than these.
        """
        self._gates = {layer: Gate(weights, config) for layer, weights in gates.items()}
        self._competes = competes
        self._planner: Planner | None = None
        self._exchange: Exchange | None = None
        self._under_way: collections.deque[Dispatched] = collections.deque()
        self.combine_s = 0.0
        """Spent waiting for the experts' sums, since the start."""
        self.generation = 0
        """Grows when what `plan` does on a GPU is not what was captured any more."""

    def adopt(self, planner: Planner, exchange: Exchange) -> None:
        """Route by this placement over this lane from now on. Between two steps, by the thread that takes them."""
        assert not self._under_way, "no step is under way"
        if self._planner is None or not planner.take_over(self._planner):
            self.generation += 1
        self._planner, self._exchange = planner, exchange

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Dispatched:
        """Returns when there is a core for what the caller computes meanwhile. Raises: LaneError."""
        return self.send(layer, x_TH, self.plan(layer, x_TH), _zeros(x_TH))

    def plan(self, layer: int, x_TH: torch.Tensor, real_T: torch.Tensor | None = None) -> DispatchPlan:
        """Gate and plan alone; see `Planner.plan`."""
        assert self._planner is not None, "adopt comes first"
        return self._planner.route(layer, self._gates[layer], x_TH, real_T)

    def send(self, layer: int, x_TH: torch.Tensor, plan: DispatchPlan, y_TH: torch.Tensor) -> Dispatched:
        """
        Args:
            y_TH: zeros in fp32, where the sums go.

        Raises: LaneError.
        """
        assert self._exchange is not None, "adopt comes first"
        reach("dispatch")
        dispatched = Dispatched(self._exchange.send(layer, x_TH, plan), y_TH)
        self._under_way.append(dispatched)
        if len(x_TH) > FEW_TOKENS and self.crowded and not self._exchange.gives_way:
            begun_s = time.perf_counter()
            self._exchange.await_first(dispatched.ticket)
            self.combine_s += time.perf_counter() - begun_s
        return dispatched

    @property
    def crowded(self) -> bool:
        """Whether to leave the cores to the shards; see `Exchange.crowded`."""
        assert self._exchange is not None, "adopt comes first"
        return self._exchange.crowded and not self._competes()

    def combine(self, dispatched: Dispatched) -> torch.Tensor:
        """The sum over shards, `[T, H]` in fp32. Raises: LaneError."""
        assert self._exchange is not None, "adopt comes first"
        first = self._under_way.popleft()
        assert first is dispatched, "combined in the order of the dispatches"
        begun_s = time.perf_counter()
        reach("combine")
        self._exchange.receive(dispatched.ticket, dispatched.y_TH)
        self.combine_s += time.perf_counter() - begun_s
        return dispatched.y_TH

    def settle(self) -> None:
        """Wait until all sums are there, or never will be. Raises: LaneError."""
        assert self._exchange is not None, "adopt comes first"
        self._exchange.settle()

    @torch.inference_mode()
    def drain(self) -> None:
        """Drop what is still under way after a step has failed, so that the exchange can be used again if it works."""
        while self._under_way and self._exchange is not None:
            # What becomes of it does not matter; an exchange that is broken will say so at its next use.
            with contextlib.suppress(LaneError):
                self.combine(self._under_way[0])
        if self._exchange is not None:
            with contextlib.suppress(LaneError):
                self._exchange.settle()


def _zeros(x_TH: torch.Tensor) -> torch.Tensor:
    """Of this shape in fp32. Numpy has them in a quarter of the time that an operator of torch takes between layers."""
    if x_TH.device.type == "cpu":
        return torch.from_numpy(np.zeros(x_TH.shape, np.float32))
    return torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
