"""The expert weights that a shard holds, by layer and slot.

Shapes: `S` slots, `H` hidden, `I` expert intermediate; `I'` and `H'` rounded up to whole panels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from model.census import expert_tensors
from model.checkpoint import Checkpoint, LoadProgress
from model.linear import PANEL, linear_cpu, packs, padded

EMPTY = -1


class ExpertSlots:
    """Stacked weights of every mixture-of-experts layer: `gate_up[layer][S, 2I, H]` and `down[layer][S, H, I]`.

    On an fp32 CPU they are packed in panels: `[S, 2I' / 16, H, 16]` and `[S, H' / 16, I, 16]`, see `model.linear_cpu`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        held: Mapping[int, Sequence[int]],
        dtype: torch.dtype,
        device: torch.device,
        progress: LoadProgress | None = None,
    ) -> None:
        """Load only the experts held.

        Args:
            held: for each layer the logical expert of each slot, EMPTY for none.

        Raises: CheckpointError.
        """
        self.held = {layer: tuple(experts) for layer, experts in held.items()}
        self.packed = packs(dtype, device)
        self.gate_up: dict[int, torch.Tensor] = {}
        self.down: dict[int, torch.Tensor] = {}
        config = checkpoint.config
        intermediate, hidden = config.moe_intermediate_size, config.hidden_size
        up_at, down_rows = (padded(intermediate), padded(hidden)) if self.packed else (intermediate, hidden)
        into: dict[str, torch.Tensor] = {}
        for layer, experts in self.held.items():
            self.gate_up[layer] = self._allocate((len(experts), 2 * up_at, hidden), dtype, device)
            self.down[layer] = self._allocate((len(experts), down_rows, intermediate), dtype, device)
            for expert, slot in _first_slots(experts).items():
                gate, up, down = expert_tensors(config, layer, expert)
                into[gate] = self.gate_up[layer][slot, :intermediate]
                into[up] = self.gate_up[layer][slot, up_at : up_at + intermediate]
                into[down] = self.down[layer][slot, :hidden]
        checkpoint.read(into, dtype, into=into, progress=progress)
        for weights in (self.gate_up, self.down):
            for layer, experts in self.held.items():
                weights[layer] = self._finish(weights[layer], experts)

    def _allocate(self, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Only slots that hold an expert touch memory: the rest stays unmapped."""
        if self.packed:
            # As in `model.linear.Packer`, for huge pages.
            return torch.from_numpy(np.zeros(shape, np.float32))
        return torch.empty(shape, dtype=dtype, device=device)

    def _finish(self, weights: torch.Tensor, experts: Sequence[int]) -> torch.Tensor:
        """Pack what was read, and copy it to an expert's further slots."""
        first = _first_slots(experts)
        for slot in first.values():
            if self.packed:
                linear_cpu().pack(weights[slot].numpy())
        for slot, expert in enumerate(experts):
            if expert != EMPTY and slot != first[expert]:
                weights[slot] = weights[first[expert]]
        return weights.view(len(weights), -1, weights.shape[2], PANEL) if self.packed else weights

    @property
    def num_slots(self) -> int:
        return max((len(experts) for experts in self.held.values()), default=0)

    def weight_bytes(self) -> int:
        """Bytes of the slots that hold an expert."""
        return sum(
            (gate_up[0].nbytes + self.down[layer][0].nbytes) * sum(e != EMPTY for e in self.held[layer])
            for layer, gate_up in self.gate_up.items()
        )


def _first_slots(experts: Sequence[int]) -> dict[int, int]:
    """The first slot of each expert: it is read once, even where a shard holds several replicas of it."""
    return {expert: slot for slot, expert in reversed(list(enumerate(experts))) if expert != EMPTY}
