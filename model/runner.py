"""Runs spans of tokens through the transformer: what a prefill and a decode engine have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from model.batch import Span, build_batch
from model.kv_cache import KvCache
from model.pages import PagePool
from model.transformer import RoutedLayer, Transformer


class ModelRunner:
    """Transformer, routed experts, and the pages that hold the sequences' KV. Belongs to one thread."""

    def __init__(
        self,
        transformer: Transformer,
        routed: RoutedLayer[Any],
        pool: PagePool,
        cache: KvCache,
        device: torch.device,
    ) -> None:
        self.pool, self.cache = pool, cache
        self._transformer, self._routed, self._device = transformer, routed, device

    def run(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        """The final hidden states `[tokens, hidden]` of each span. Raises: LaneError; running again is safe."""
        batch, last_rows = build_batch(spans, self.pool, self._device)
        hidden_TH = self._transformer.forward(batch, self._routed)
        return [
            hidden_TH[last + 1 - len(span.token_ids) : last + 1] for span, last in zip(spans, last_rows, strict=True)
        ]

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """`[T, V]` in fp32."""
        return self._transformer.logits(hidden_TH)
