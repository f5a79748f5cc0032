"""Runs texts through a model in one process, and notes which experts every token chose.

The serving path is not touched: the layer's gate is asked once more beside it.

Shapes: `T` tokens, `H` hidden, `L` mixture-of-experts layers, `K` experts per token.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from experts.shard import ExpertShard
from model.batch import Span
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.kv_cache import KvCache
from model.pages import PagePool
from model.runner import ModelRunner
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.weights import GateWeights, gates_of, load_attention_weights
from octet.errors import CheckpointError
from ops.local import load_slots
from router.exchange import LocalExchange
from router.gate import Gate
from router.placement import place_evenly
from router.plan import Planner
from router.routed_experts import Dispatched, RoutedExperts

_MAX_TOKENS = 2048
"""Of one piece; longer texts are cut, and each piece is read on its own."""
_CHUNK, _PAGE_SIZE = 256, 16
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the gates chose for the tokens of one text."""

    token_ids: tuple[int, ...]
    experts_LTK: npt.NDArray[np.int16]
    weights_LTK: npt.NDArray[np.float32]


class Observer:
    """A model whose routing can be watched. Everything is held in this process."""

    def __init__(self, model_dir: pathlib.Path) -> None:
        """Raises: CheckpointError, also for a checkpoint without a tokenizer."""
        checkpoint = Checkpoint.open(model_dir)
        tokenizer = Tokenizer.open(model_dir)
        if tokenizer is None:
            raise CheckpointError("tokenizer.json", "", "no file", "a tokenizer, for a report about texts")
        self.tokenizer, self.config = tokenizer, checkpoint.config
        self._max_tokens = min(_MAX_TOKENS, self.config.max_position_embeddings)
        weights = load_attention_weights(checkpoint, torch.float32, _CPU)
        placement = place_evenly(self.config.moe_layers, self.config.n_routed_experts, num_shards=1)
        shard = ExpertShard(load_slots(checkpoint, placement, 0, torch.float32, _CPU))
        gates = gates_of(weights)
        routed = RoutedExperts(self.config, gates)
        routed.adopt(Planner(placement, _CPU), LocalExchange([shard.serve]))
        self._noting = _Noting(self.config, gates, routed)
        num_pages = -(-self._max_tokens // _PAGE_SIZE)
        cache = KvCache(self.config, num_pages, _PAGE_SIZE, torch.float32, _CPU)
        transformer = Transformer(self.config, weights, cache, self._max_tokens)
        self._pool = PagePool(num_pages, _PAGE_SIZE)
        self._runner = ModelRunner(transformer, self._noting, self._pool, cache, _CPU)

    def observe(self, text: str) -> Routing:
        """What every token of the text is routed to."""
        token_ids = self.tokenizer.encode(text)
        for first in range(0, len(token_ids), self._max_tokens):
            self._read(token_ids[first : first + self._max_tokens])
        experts_LTK, weights_LTK = self._noting.take()
        return Routing(token_ids=tuple(token_ids), experts_LTK=experts_LTK, weights_LTK=weights_LTK)

    def _read(self, token_ids: Sequence[int]) -> None:
        pages = self._pool.allocate(self._pool.pages_for(len(token_ids)))
        assert pages is not None, "there are pages for the longest piece"
        for start in range(0, len(token_ids), _CHUNK):
            self._runner.run([Span(token_ids=token_ids[start : start + _CHUNK], start=start, pages=pages)])
        self._pool.release(pages)


class _Noting:
    """A `RoutedLayer` that notes what the gate chooses before it hands the rows on."""

    def __init__(self, config: ModelConfig, gates: Mapping[int, GateWeights], routed: RoutedExperts) -> None:
        self._gates = {layer: Gate(weights, config) for layer, weights in gates.items()}
        self._config, self._routed = config, routed
        self._noted: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)

    def dispatch(self, layer: int, x_TH: torch.Tensor) -> Dispatched:
        self._noted[layer].append(self._gates[layer].select(x_TH))
        return self._routed.dispatch(layer, x_TH)

    def combine(self, dispatched: Dispatched) -> torch.Tensor:
        return self._routed.combine(dispatched)

    def settle(self) -> None:
        self._routed.settle()

    def drain(self) -> None:
        self._routed.drain()

    def take(self) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.float32]]:
        """What was noted since the last time, in order of layers and tokens; nothing has been if there was no token."""
        layers = self._config.moe_layers
        none = [(torch.empty(0, self._config.num_experts_per_tok), torch.empty(0, self._config.num_experts_per_tok))]
        experts = [torch.cat([ids for ids, _ in self._noted[layer] or none]).numpy() for layer in layers]
        weights = [torch.cat([of for _, of in self._noted[layer] or none]).numpy() for layer in layers]
        self._noted.clear()
        return np.stack(experts).astype(np.int16), np.stack(weights).astype(np.float32)
