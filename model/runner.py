"""Runs spans of tokens through the transformer: what a prefill and a decode engine have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from model.batch import Span, build_batch, build_rows, halve
from model.kv_cache import KvCache
from model.mtp import MtpHead
from model.pages import PagePool
from model.sampler import sampler_cpu
from model.step_graphs import StepGraphs
from model.transformer import RoutedLayer, Transformer
from octet.errors import ExpertMissingError, LaneError


class ModelRunner:
    """Transformer, routed experts, and the pages that hold the sequences' KV. Belongs to one thread."""

    def __init__(
        self,
        transformer: Transformer,
        routed: RoutedLayer[Any],
        pool: PagePool,
        cache: KvCache,
        device: torch.device,
        ping_pong_rows: int | None = None,
        mtp: MtpHead | None = None,
        graphs: StepGraphs | None = None,
        takes_turns: Callable[[], bool] = lambda: True,
    ) -> None:
        """
        Args:
            ping_pong_rows: steps of at least so many tokens are computed as two micro-batches that take turns.
            mtp: what drafts, if anything does.
            graphs: for the steps that they take, on a GPU.
            takes_turns: whether there are cores for both micro-batches now.
        """
        self.pool, self.cache = pool, cache
        self._transformer, self._routed, self._device = transformer, routed, device
        self._ping_pong_rows, self._mtp, self._graphs = ping_pong_rows, mtp, graphs
        self._takes_turns = takes_turns
        self.between_layers: Callable[[], None] = lambda: None
        """Called in the midst of `run`, for what cannot wait for its end."""
        if device.type == "cpu":
            # Compiled now, so that no request waits for it.
            sampler_cpu()

    @property
    def invariant(self) -> bool:
        """See `Transformer.invariant`."""
        return self._transformer.invariant

    @property
    def drafts(self) -> bool:
        """Whether there is an MTP head, whose keys and values have to be kept."""
        return self._mtp is not None

    def run(self, spans: Sequence[Span]) -> list[torch.Tensor]:
        """The final hidden states `[wanted tokens, hidden]` of each span. Raises: LaneError; running again is safe."""
        if self._graphs is not None and self._graphs.takes(spans):
            with self._whole():
                hidden_TH = self._graphs.run(spans)
                self._check([hidden_TH])
            return list(hidden_TH.split([len(span.token_ids) for span in spans]))
        whole = [span.wanted == "all" for span in spans]
        if any(whole) and not all(whole):
            return self._run_apart(spans, whole)
        num_tokens = sum(len(span.token_ids) for span in spans)
        if self._ping_pong_rows is None or num_tokens < max(self._ping_pong_rows, 2) or not self._takes_turns():
            return self._forward([spans])[0]
        first, second = halve(spans)
        hidden = self._forward([first, second])
        if len(first) + len(second) == len(spans):
            return hidden[0] + hidden[1]
        # The span in the middle was cut in two.
        return [*hidden[0][:-1], torch.cat((hidden[0][-1], hidden[1][0])), *hidden[1][1:]]

    def _run_apart(self, spans: Sequence[Span], whole: Sequence[bool]) -> list[torch.Tensor]:
        """Those that are wanted as a whole one after the others: in a last layer that computes every row, the others'
        last rows would take another way, and not come out with the bits that they have without these."""
        hidden: dict[int, torch.Tensor] = {}
        for chosen in (False, True):
            indices = [index for index, is_whole in enumerate(whole) if is_whole is chosen]
            hidden |= zip(indices, self.run([spans[index] for index in indices]), strict=True)
        return [hidden[index] for index in range(len(spans))]

    def logits(self, hidden_TH: torch.Tensor) -> torch.Tensor:
        """`[T, V]` in fp32."""
        return self._transformer.logits(hidden_TH)

    def draft(self, spans: Sequence[Span], hidden_BH: torch.Tensor) -> torch.Tensor:
        """What the MTP head makes of single tokens, each one ahead of its span's position: `[B, H]`, for `logits`.

        Args:
            hidden_BH: of those positions, from `run` or from here.

        Raises: LaneError; running again is safe.
        """
        assert self._mtp is not None, "there is an MTP head"
        batch, _ = build_batch(spans, self.pool, self._device)
        with self._whole():
            drafted_BH = self._mtp.forward(batch, hidden_BH, self._routed)
            self._check([drafted_BH])
        return drafted_BH

    def write_draft_kv(self, spans: Sequence[Span], hidden: Sequence[torch.Tensor]) -> None:
        """Keep the MTP layer's keys and values up to date. The tokens of a span are each one ahead of its position.

        Args:
            hidden: `[tokens, H]` of each span's positions.
        """
        assert self._mtp is not None, "there is an MTP head"
        self._mtp.write_kv(build_rows(spans, self.pool, self._device), torch.cat(list(hidden)))

    def _forward(self, parts: Sequence[Sequence[Span]]) -> list[list[torch.Tensor]]:
        built = [build_batch(spans, self.pool, self._device) for spans in parts]
        with self._whole():
            hidden = self._transformer.forward([batch for batch, _ in built], self._routed, self.between_layers)
            self._check(hidden)
        return [[h_TH[span_rows] for span_rows in rows] for h_TH, (_, rows) in zip(hidden, built, strict=True)]

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """All of a step, or nothing of it."""
        try:
            yield
        except LaneError:
            self._routed.drain()
            raise

    def _check(self, hidden: Sequence[torch.Tensor]) -> None:
        """On a GPU nobody waits for what an expert shard has to say, and one that lacks an expert answers with NaN.

        Raises: ExpertMissingError.
        """
        if self._device.type != "cuda":
            return
        # All replies have been announced: from here on the device is not waiting for anybody.
        self._routed.settle()
        if not all(bool(h_TH.isfinite().all()) for h_TH in hidden):
            raise ExpertMissingError(
                "a hidden state is not finite: an expert shard was asked for an expert that it does not hold, or the "
                "model's numbers overflow"
            )


def tensor_bytes(x: torch.Tensor) -> bytes:
    """The elements as they lie in memory; `tensor_from` is the inverse."""
    data: bytes = x.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return data


def tensor_from(data: bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """One-dimensional."""
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device)
