"""The multi-token-prediction head of a checkpoint, which drafts the token after the next (DeepSeek-V3, 2024, §2.2).

At position `i` it joins the model's final hidden state of `i` with the embedding of token `i + 1`, runs one decoder
layer with keys and values of its own, and its output, through the model's own head, predicts token `i + 2`. To look
further ahead it takes its own output in place of the hidden state, as in vLLM and SGLang; of several MTP layers only
the first is used, as in SGLang.

Shapes: `T` tokens, `H` hidden.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from model.batch import Batch
from model.linear import linear
from model.transformer import RoutedLayer, Transformer, take_turns
from model.weights import MtpWeights

_Pending = TypeVar("_Pending")


class MtpHead:
    """One more layer behind a transformer, in the same cache. Row t of a batch is token `i + 1` at position `i`."""

    def __init__(self, transformer: Transformer, weights: MtpWeights, index: int) -> None:
        """
        Args:
            index: the layer's number, in the cache and to its routed experts.
        """
        self._transformer, self._weights, self._index = transformer, weights, index

    @torch.inference_mode()
    def forward(self, batch: Batch, hidden_TH: torch.Tensor, routed: RoutedLayer[_Pending]) -> torch.Tensor:
        """Normalised hidden states `[T, H]`: the head's logits are the transformer's of these.

        Args:
            hidden_TH: the normalised hidden state at each position, the transformer's or this method's.

        Raises: LaneError; running again is safe.
        """
        layer = (self._index, self._weights.layer)
        steps = self._transformer.layers(self._join(batch, hidden_TH), [layer], batch, routed)
        (x_TH,) = take_turns([steps])
        return self._transformer.norm(x_TH, self._weights.norm)

    @torch.inference_mode()
    def write_kv(self, batch: Batch, hidden_TH: torch.Tensor) -> None:
        """Only the layer's keys and values, for what follows to attend to: neither attention nor experts."""
        self._transformer.write_kv(self._join(batch, hidden_TH), self._index, self._weights.layer, batch)

    def _join(self, batch: Batch, hidden_TH: torch.Tensor) -> torch.Tensor:
        embedding_TH = self._transformer.norm(self._transformer.embed(batch), self._weights.embedding_norm)
        hidden_TH = self._transformer.norm(hidden_TH, self._weights.hidden_norm)
        return linear(torch.cat((embedding_TH, hidden_TH), dim=1), self._weights.join)
