"""The decoder stack of Glm4Moe without its routed experts.

Shapes: `T` tokens, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import collections
import functools
import importlib
from collections.abc import Callable, Generator, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
import torch.nn.functional as F

from model.attention import Attention
from model.batch import Batch, WantedRows
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.linear import PackedMatrix, linear, packs, swiglu
from model.norm import rms_norm
from model.rotary import RotaryEmbedding
from model.weights import AttentionWeights, LayerWeights

if TYPE_CHECKING:
    from model.compiled_layers import CompiledLayers

_Pending = TypeVar("_Pending")


class RoutedLayer(Protocol[_Pending]):
    """The routed experts of every mixture-of-experts layer, wherever they are."""

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> _Pending:
        """Send the rows on their way; return when there is something to compute on meanwhile."""

    def combine(self, pending: _Pending) -> torch.Tensor:
        """Wait for the experts' weighted sum `[T, H]`; in the order of the dispatches. Raises: LaneError."""

    def settle(self) -> None:
        """Wait until all sums are there, or never will be, where `combine` does not. Raises: LaneError."""

    def drain(self) -> None:
        """Drop what is still under way after a step has failed."""


class Transformer:
    """Computes hidden states for a `Batch`, writing its keys and values into the cache."""

    def __init__(self, config: ModelConfig, weights: AttentionWeights, cache: KvCache, max_model_len: int) -> None:
        self._config, self._weights, self._cache = config, weights, cache
        self._rotary = RotaryEmbedding(config, max_model_len, weights.norm.device)
        self._attend = Attention(config, cache, self._rotary)
        self._compiled: CompiledLayers | None = None
        if packs(cache.dtype, cache.device):
            self._compiled = compiled_layers().CompiledLayers(config, cache)

    @property
    def invariant(self) -> bool:
        """Whether a token that attends on its own has the same bits in any batch: compiled sums have one order."""
        return self._compiled is not None

    @torch.inference_mode()
    def forward(
        self, batches: Sequence[Batch], routed: RoutedLayer[_Pending], between: Callable[[], None] = lambda: None
    ) -> list[torch.Tensor]:
        """The normalised hidden states `[T, H]` of each batch.

        Batches take turns, layer by layer: while the rows of one are with the experts, the next computes its attention.
        One may continue a sequence that another, before it, begins. Raises: LaneError; running again is safe.

        Args:
            between: called between two layers, for what cannot wait for the end.
        """
        return take_turns([self._steps(batch, routed) for batch in batches], between)

    def _steps(self, batch: Batch, routed: RoutedLayer[_Pending]) -> Generator[None, None, torch.Tensor]:
        *layers, last = enumerate(self._weights.layers)
        if batch.wanted is None:
            x_TH = yield from self.layers(self.embed(batch), [*layers, last], batch, routed)
        else:
            x_TH = yield from self.layers(self.embed(batch), layers, batch, routed)
            x_TH = yield from self._last_layer(x_TH, *last, batch, batch.wanted, routed)
        return self.norm(x_TH, self._weights.norm)

    def layers(
        self,
        x_TH: torch.Tensor,
        layers: Iterable[tuple[int, LayerWeights]],
        batch: Batch,
        routed: RoutedLayer[_Pending],
    ) -> Generator[None, None, torch.Tensor]:
        """These decoder layers, with their numbers, over one batch; yields while each layer's rows are away."""
        cos_sin = self._rotary.at(batch.positions_T, x_TH.dtype)
        if self._compiled is not None:
            yield from self._run_compiled(self._compiled, x_TH, cos_sin, layers, batch, routed)
            return x_TH
        for index, layer in layers:
            h_TH = self.norm(x_TH, layer.input_norm)
            x_TH = x_TH + self._attend(index, layer, h_TH, batch, cos_sin)
            x_TH = yield from self._feed_forward(x_TH, index, layer, routed)
        return x_TH

    def _feed_forward(
        self, x_TH: torch.Tensor, index: int, layer: LayerWeights, routed: RoutedLayer[_Pending]
    ) -> Generator[None, None, torch.Tensor]:
        """A layer's second half."""
        h_TH = self.norm(x_TH, layer.post_attention_norm)
        if layer.gate is None:
            return x_TH + swiglu(h_TH, layer.mlp)
        pending = routed.dispatch(index, h_TH)
        shared_TH = swiglu(h_TH, layer.mlp)
        yield
        return x_TH + (routed.combine(pending).to(x_TH.dtype) + shared_TH)

    def _last_layer(
        self,
        x_TH: torch.Tensor,
        index: int,
        layer: LayerWeights,
        batch: Batch,
        wanted: WantedRows,
        routed: RoutedLayer[_Pending],
    ) -> Generator[None, None, torch.Tensor]:
        """`[W, H]`: of the other rows nobody will see more than keys and values."""
        if wanted.decode is None:
            self.write_kv(x_TH, index, layer, batch)
            return x_TH[:0]
        cos_sin = self._rotary.at(batch.positions_T, x_TH.dtype)
        if self._compiled is not None:
            x_WH = self._compiled.wanted(x_TH, batch, cos_sin).attend(index, layer)
        else:
            h_TH = self.norm(x_TH, layer.input_norm)
            attended_WH = self._attend.of_some(index, layer, h_TH, batch, cos_sin, wanted.rows_W, wanted.decode)
            x_WH = x_TH[wanted.rows_W] + attended_WH
        return (yield from self._feed_forward(x_WH, index, layer, routed))

    @staticmethod
    def _run_compiled(
        compiled: CompiledLayers,
        x_TH: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        layers: Iterable[tuple[int, LayerWeights]],
        batch: Batch,
        routed: RoutedLayer[_Pending],
    ) -> Generator[None, None, None]:
        """The same in fewer and compiled calls. Changes `x_TH` in place."""
        current = compiled.begin(x_TH, batch, cos_sin)
        for index, layer in layers:
            current.attend(index, layer)
            if layer.gate is None:
                current.feed_forward(index, layer)
            else:
                pending = routed.dispatch(index, current.h_TH)
                current.share(index, layer)
                yield
                current.add_experts(routed.combine(pending))

    def write_kv(self, x_TH: torch.Tensor, index: int, layer: LayerWeights, batch: Batch) -> None:
        """Only what a decoder layer leaves in the cache."""
        cos_sin = self._rotary.at(batch.positions_T, x_TH.dtype)
        if self._compiled is not None:
            self._compiled.wanted(x_TH, batch, cos_sin).write_kv(index, layer)
        else:
            self._attend.write(index, layer, self.norm(x_TH, layer.input_norm), batch, cos_sin)

    def embed(self, batch: Batch) -> torch.Tensor:
        """`[T, H]`."""
        embedding = self._weights.embedding
        if isinstance(embedding, PackedMatrix):
            return embedding.rows(batch.token_ids_T)
        return F.embedding(batch.token_ids_T, embedding)

    @torch.inference_mode()
    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """`[T, V]` in fp32."""
        if self._compiled is not None and isinstance(self._weights.lm_head, PackedMatrix):
            return self._compiled.project(hidden_TH, self._weights.lm_head)
        return linear(hidden_TH, self._weights.lm_head).float()

    def norm(self, x_TH: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x_TH, weight, self._config.rms_norm_eps)


def take_turns(
    batches: Sequence[Generator[None, None, torch.Tensor]], between: Callable[[], None] = lambda: None
) -> list[torch.Tensor]:
    """Run forward passes to their ends, each going on for a layer while the rows of the others are away."""
    hidden: dict[int, torch.Tensor] = {}
    turns = collections.deque(enumerate(batches))
    while turns:
        index, steps = turns.popleft()
        try:
            next(steps)
        except StopIteration as done:
            hidden[index] = done.value
        else:
            turns.append((index, steps))
            between()
    return [hidden[index] for index in range(len(batches))]


@functools.cache
def compiled_layers() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("model.compiled_layers")
