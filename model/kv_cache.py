"""The keys and values of every layer, in pages.

Shapes: `L` layers, `P` pages, `G` tokens per page, `N` KV heads, `D` head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from model.config import ModelConfig

_PART_BYTES = 4 * 2**20


class KvCache:
    """One tensor `[L, 2, P, G, N, D]`. Writes are indexed by position, so a step run again overwrites itself.

    On a GPU there is one page more than was asked for, which is nobody's: where a batch is filled up, its tokens need a
    place too.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_draft_layers: int = 0,
    ) -> None:
        """
        Args:
            num_draft_layers: MTP layers with keys and values of their own, behind the decoder layers.
        """
        num_layers = config.num_hidden_layers + num_draft_layers
        num_pages += int(device.type == "cuda")
        shape = (num_layers, 2, num_pages, page_size, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty: a masked position may hold anything finite, and NaN · 0 would spread.
        self.page_size = page_size
        self._kv = _zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self._flat = self._kv.view(shape[0], 2, num_pages * page_size, *shape[4:])

    @property
    def dtype(self) -> torch.dtype:
        return self._kv.dtype

    @property
    def device(self) -> torch.device:
        return self._kv.device

    @property
    def nobodys_slot(self) -> int:
        """The flat slot where what nobody wants is written; on a GPU."""
        assert self._kv.is_cuda, "only GPUs fill batches up"
        return self._flat.shape[2] - 1

    def of_layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer by flat slot, `[P · G, N, D]`, as views."""
        return self._flat[layer, 0], self._flat[layer, 1]

    def write(self, layer: int, k_TND: torch.Tensor, v_TND: torch.Tensor, kv_slots_T: torch.Tensor) -> None:
        self._flat[layer, 0].index_copy_(0, kv_slots_T, k_TND)
        self._flat[layer, 1].index_copy_(0, kv_slots_T, v_TND)

    def gather(self, layer: int, kv_slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[len(kv_slots), N, D]`."""
        return self._flat[layer, 0].index_select(0, kv_slots), self._flat[layer, 1].index_select(0, kv_slots)

    def gather_pages(self, layer: int, pages_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, P · G, N, D]`."""
        k, v = self._kv[layer, 0][pages_BP], self._kv[layer, 1][pages_BP]
        return k.flatten(1, 2), v.flatten(1, 2)

    def page_bytes(self) -> int:
        return self._kv[:, :, 0].numel() * self._kv.element_size()

    def parts(self, pages: Sequence[int]) -> Iterator[Sequence[int]]:
        """Pages in the pieces in which they are handed over, of at most 4 MiB unless a single page is larger."""
        size = max(1, _PART_BYTES // self.page_bytes())
        return (pages[first : first + size] for first in range(0, len(pages), size))

    def export_pages(self, pages: Sequence[int]) -> torch.Tensor:
        """A contiguous copy `[L, 2, len(pages), G, N, D]`, to be sent."""
        return self._kv.index_select(2, torch.tensor(pages, device=self._kv.device))

    def import_pages(self, pages: Sequence[int], exported: torch.Tensor) -> None:
        """The inverse of `export_pages`; `exported` may be flat and raw bytes. A thread may import pages of its own."""
        shape = (*self._kv.shape[:2], len(pages), *self._kv.shape[3:])
        self._kv.index_copy_(
            2,
            torch.tensor(pages, device=self._kv.device),
            exported.view(self._kv.dtype).view(shape).to(self._kv.device),
        )
        if self._kv.is_cuda:
            # Whoever hears that they have come may compute on another stream.
            torch.cuda.current_stream(self._kv.device).synchronize()

    def copy_page(self, source: int, target: int) -> None:
        self._kv[:, :, target].copy_(self._kv[:, :, source])


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose memory is there: to find it at the first touch can cost a prefill step a tenth of its time and more,
    as where a virtual machine's memory is its host's to give."""
    # Numpy asks for huge pages, which torch does not, but has its zeros from calloc, which writes nothing.
    memory = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    memory.fill(0)
    return torch.from_numpy(memory).view(dtype).view(shape)
