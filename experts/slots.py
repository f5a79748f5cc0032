"""The expert weights that a shard holds, by layer and slot.

Shapes: `S` slots, `H` hidden, `I` expert intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model.census import expert_tensors
from model.checkpoint import Checkpoint, LoadProgress

EMPTY = -1


class ExpertSlots:
    """Stacked weights of every mixture-of-experts layer: `gate_up[layer][S, 2I, H]` and `down[layer][S, H, I]`."""

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
        config = checkpoint.config
        self.held = {layer: tuple(experts) for layer, experts in held.items()}
        self.gate_up: dict[int, torch.Tensor] = {}
        self.down: dict[int, torch.Tensor] = {}
        intermediate, hidden = config.moe_intermediate_size, config.hidden_size
        into: dict[str, torch.Tensor] = {}
        for layer, experts in self.held.items():
            # Only slots that hold an expert touch memory: the rest of an empty tensor stays unmapped.
            self.gate_up[layer] = torch.empty(len(experts), 2 * intermediate, hidden, dtype=dtype, device=device)
            self.down[layer] = torch.empty(len(experts), hidden, intermediate, dtype=dtype, device=device)
            for expert, slot in _first_slots(experts).items():
                gate, up, down = expert_tensors(config, layer, expert)
                into[gate], into[up] = self.gate_up[layer][slot].chunk(2)
                into[down] = self.down[layer][slot]
        checkpoint.read(into, dtype, into=into, progress=progress)
        for layer, experts in self.held.items():
            first = _first_slots(experts)
            for slot, expert in enumerate(experts):
                if expert != EMPTY and slot != first[expert]:
                    self.gate_up[layer][slot] = self.gate_up[layer][first[expert]]
                    self.down[layer][slot] = self.down[layer][first[expert]]

    @property
    def num_slots(self) -> int:
        return max((len(experts) for experts in self.held.values()), default=0)

    @property
    def on_fp32_cpu(self) -> bool:
        """Whether the kernel for few rows on a CPU applies; it takes columns in pairs."""
        return all(
            down.device.type == "cpu" and down.dtype == torch.float32 and down.shape[1] % 2 == 0
            for down in self.down.values()
        )

    def weight_bytes(self) -> int:
        """Bytes of the slots that hold an expert."""
        return sum(
            (gate_up[0].nbytes + self.down[layer][0].nbytes) * sum(e != EMPTY for e in self.held[layer])
            for layer, gate_up in self.gate_up.items()
        )


def _first_slots(experts: Sequence[int]) -> dict[int, int]:
    """The first slot of each expert: it is read once, even where a shard holds several replicas of it."""
    return {expert: slot for slot, expert in reversed(list(enumerate(experts))) if expert != EMPTY}
