"""Decode steps on a GPU as CUDA graphs: what the host would launch a thousand times is launched at once.

A step is captured in pieces, from one exchange with the experts to the next, since the exchange itself is not the
device's alone. Each size of batch has its pieces; a batch is filled up to the next size with tokens that attend to
nothing, go to no expert, and write where nobody reads.

Shapes: `B` rows of a batch, `P` pages of the longest sequence that may be, `H` hidden.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

from model.batch import Batch, Span
from model.kv_cache import KvCache
from model.pages import PagePool
from model.step_inputs import StepInputs
from model.transformer import RoutedLayer, Transformer

_Pending = TypeVar("_Pending")
_Piece = Callable[["PlannedLayer[Any]"], None]


class PlannedLayer(RoutedLayer[_Pending], Protocol[_Pending]):
    """Routed experts whose dispatch comes in two halves: what the device does alone, and the exchange."""

    generation: int
    """Grows when `plan` is not what it was."""

    def plan(self, layer: int, x_TH: torch.Tensor, real_T: torch.Tensor | None) -> Any: ...
    def send(self, layer: int, x_TH: torch.Tensor, plan: Any, y_TH: torch.Tensor) -> _Pending: ...


class StepGraphs:
    """Runs batches of tokens that attend one by one. Belongs to one thread."""

    def __init__(
        self,
        transformer: Transformer,
        routed: PlannedLayer[Any],
        pool: PagePool,
        cache: KvCache,
        most_rows: int,
        max_model_len: int,
    ) -> None:
        self._transformer, self._routed, self._pool, self._cache = transformer, routed, pool, cache
        self._sizes = sizes_up_to(most_rows)
        self._inputs = StepInputs(self._sizes[-1], pool.pages_for(max_model_len), cache.nobodys_slot, cache.device)
        self._steps: dict[int, _Step] = {}
        self._generation = routed.generation
        self._memory: Any = None
        """The handle of the pool that all graphs share."""
        self._rows: tuple[torch.Tensor, torch.Tensor] | None = None
        """What goes to the experts and what comes back, `[B, H]`, of every layer: one is with them at a time."""

    def takes(self, spans: Sequence[Span]) -> bool:
        num_rows = sum(len(span.token_ids) for span in spans)
        return num_rows <= self._sizes[-1] and all(span.by_token for span in spans)

    @torch.inference_mode()
    def run(self, spans: Sequence[Span]) -> torch.Tensor:
        """The final hidden states `[tokens, H]` of all spans, one after the other.

        Raises: LaneError; running again is safe.
        """
        if self._generation != self._routed.generation:
            # The device may not be done with them.
            torch.cuda.synchronize(self._cache.device)
            self._steps.clear()
            self._generation = self._routed.generation
        num_rows = sum(len(span.token_ids) for span in spans)
        size = self._sizes[bisect.bisect_left(self._sizes, num_rows)]
        if size not in self._steps:
            if not self._steps:
                # A pool ends with the last of its graphs, and torch takes its handle no more.
                self._memory = torch.cuda.graph_pool_handle()
            # With nothing in it, so that a batch which fails is captured, or none is.
            self._inputs.fill([], self._pool)
            self._steps[size] = self._capture(size)
        self._inputs.fill(spans, self._pool)
        hidden_BH = self._steps[size].run(self._routed)
        # A copy: the next step writes there again.
        return hidden_BH[:num_rows].clone()

    def _capture(self, size: int) -> _Step:
        batch = self._inputs.batch(size)
        # Once without capture: compilers and libraries do at their first use what a graph cannot hold.
        (hidden_BH,) = self._transformer.forward([batch], _Uncaptured(self._routed, batch))
        self._routed.settle()
        if self._rows is None:
            shape = (self._sizes[-1], hidden_BH.shape[1])
            x_BH = torch.empty(shape, dtype=hidden_BH.dtype, device=hidden_BH.device)
            self._rows = x_BH, torch.empty(shape, dtype=torch.float32, device=hidden_BH.device)
        x_BH, y_BH = (rows[:size] for rows in self._rows)
        recorder = _Recorder(self._routed, batch, x_BH, y_BH, self._memory)
        device = self._cache.device
        torch.cuda.synchronize(device)
        side = torch.cuda.Stream(device)
        with torch.cuda.stream(side):
            recorder.begin()
            try:
                (hidden_BH,) = self._transformer.forward([batch], recorder)
            finally:
                recorder.end()
        torch.cuda.current_stream(device).wait_stream(side)
        # Pieces hold their recorder. Held by it, too, they would outlive their step until garbage is collected.
        pieces, recorder.pieces = recorder.pieces, []
        return _Step(pieces, hidden_BH)


def sizes_up_to(most_rows: int) -> tuple[int, ...]:
    """Batch sizes that are captured: small ones at powers of two, then every eighth, then ever coarser by a quarter."""
    sizes = [size for size in (1, 2, 4) if size < most_rows]
    size = 8
    while size < most_rows:
        sizes.append(size)
        size += max(8, size // 4 // 8 * 8)
    return (*sizes, most_rows)


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One size's pieces, in order, and where they leave their result."""

    pieces: Sequence[_Piece]
    hidden_BH: torch.Tensor

    def run(self, routed: PlannedLayer[Any]) -> torch.Tensor:
        for piece in self.pieces:
            piece(routed)
        return self.hidden_BH


class _Uncaptured:
    """The routed experts for a batch that is filled up."""

    def __init__(self, routed: PlannedLayer[Any], batch: Batch) -> None:
        self._routed, self._real_B = routed, _real(batch)

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Any:
        plan = self._routed.plan(layer, x_TH, self._real_B)
        return self._routed.send(layer, x_TH, plan, torch.zeros_like(x_TH, dtype=torch.float32))

    def combine(self, pending: Any) -> torch.Tensor:
        return self._routed.combine(pending)

    def settle(self) -> None:
        self._routed.settle()

    def drain(self) -> None:
        self._routed.drain()


class _Recorder:
    """In their place while a step is captured: ends a piece where the exchange comes, and begins the next behind it."""

    def __init__(
        self, routed: PlannedLayer[Any], batch: Batch, x_BH: torch.Tensor, y_BH: torch.Tensor, memory: Any
    ) -> None:
        self._routed, self._batch, self._memory = routed, batch, memory
        self._x_BH, self._y_BH = x_BH, y_BH
        self._real_B: torch.Tensor | None = None
        self._graph = torch.cuda.CUDAGraph()
        self.pieces: list[_Piece] = []

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on using the device meanwhile.
        self._graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
        if self._real_B is None:
            self._real_B = _real(self._batch)

    def end(self) -> None:
        graph = self._graph
        graph.capture_end()
        self.pieces.append(lambda _: graph.replay())

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> list[Any]:
        plan = self._routed.plan(layer, x_TH, self._real_B)
        self._x_BH.copy_(x_TH)
        self._y_BH.zero_()
        self.end()
        under_way: list[Any] = []

        def send(routed: PlannedLayer[Any]) -> None:
            # Whatever a step that failed has left there is gone.
            under_way[:] = [routed.send(layer, self._x_BH, plan, self._y_BH)]

        self.pieces.append(send)
        self.begin()
        return under_way

    def combine(self, pending: list[Any]) -> torch.Tensor:
        self.end()

        def receive(routed: PlannedLayer[Any]) -> None:
            routed.combine(pending.pop())

        self.pieces.append(receive)
        self.begin()
        return self._y_BH

    def settle(self) -> None:
        raise AssertionError("nothing is received while a step is captured")

    def drain(self) -> None:
        raise AssertionError("nothing is sent while a step is captured")


def _real(batch: Batch) -> torch.Tensor:
    """`[B]`, false for what fills the batch up."""
    assert batch.decode is not None
    return batch.decode.lengths_B > 0
