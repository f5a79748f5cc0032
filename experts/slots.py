"""The expert weights that a shard holds, by layer and slot.

Shapes: `S` slots, `H` hidden, `I` expert intermediate; `I'` and `H'` rounded up to whole panels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from experts.memory import SlotMemory
from model.census import expert_tensors
from model.checkpoint import Checkpoint
from model.linear import PANEL, linear_cpu, packs, padded
from model.load_progress import LoadProgress

EMPTY = -1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fill:
    """One slot and the logical expert that it is to hold."""

    layer: int
    slot: int
    expert: int


class ExpertSlots:
    """Stacked weights of every mixture-of-experts layer: `gate_up[layer][S, 2I, H]` and `down[layer][S, H, I]`.

    On an fp32 CPU they are packed in panels: `[S, 2I' / 16, H, 16]` and `[S, H' / 16, I, 16]`, see `model.linear_cpu`,
    and slots that hold nothing take no memory. One thread fills and empties slots; another may compute with the rest.
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
        self._checkpoint, self._dtype = checkpoint, dtype
        config = checkpoint.config
        self._intermediate, self._hidden = config.moe_intermediate_size, config.hidden_size
        self.packed, self.device = packs(dtype, device), device
        self._up_at = padded(self._intermediate) if self.packed else self._intermediate
        down_rows = padded(self._hidden) if self.packed else self._hidden
        self._memory: dict[int, tuple[SlotMemory, SlotMemory]] = {}
        self.gate_up: dict[int, torch.Tensor] = {}
        self.down: dict[int, torch.Tensor] = {}
        self._held = {layer: [EMPTY] * len(experts) for layer, experts in held.items()}
        self.holds: dict[int, npt.NDArray[np.bool_]] = {}
        """`[S]`: which slots of a layer may be asked for."""
        self.holds_on_device: dict[int, torch.Tensor] = {}
        """The same as uint8, on a GPU."""
        for layer, experts in held.items():
            shapes = (len(experts), 2 * self._up_at, self._hidden), (len(experts), down_rows, self._intermediate)
            if self.packed:
                memory = SlotMemory(shapes[0]), SlotMemory(shapes[1])
                self._memory[layer] = memory
                self.gate_up[layer], self.down[layer] = (
                    part.weights.view(len(experts), -1, part.weights.shape[2], PANEL) for part in memory
                )
            else:
                self.gate_up[layer], self.down[layer] = (
                    torch.empty(shape, dtype=dtype, device=device) for shape in shapes
                )
            self.holds[layer] = np.zeros(len(experts), dtype=np.bool_)
            if device.type == "cuda":
                self.holds_on_device[layer] = torch.zeros(len(experts), dtype=torch.uint8, device=device)
        self.fill(
            [
                Fill(layer=layer, slot=slot, expert=expert)
                for layer, experts in held.items()
                for slot, expert in enumerate(experts)
                if expert != EMPTY
            ],
            progress,
        )

    @functools.cached_property
    def arrays(self) -> dict[int, tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
        """`gate_up` and `down` of each layer, where they are packed."""
        return {layer: (gate_up.numpy(), self.down[layer].numpy()) for layer, gate_up in self.gate_up.items()}

    def held(self, layer: int) -> tuple[int, ...]:
        """The logical expert of each slot, EMPTY for none."""
        return tuple(self._held[layer])

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._held)

    def fill(self, fills: Sequence[Fill], progress: LoadProgress | None = None) -> None:
        """Read experts from the checkpoint into slots that nobody asks for. One that has several slots is read once.

        Raises: CheckpointError.
        """
        first: dict[tuple[int, int], Fill] = {}
        into: dict[str, torch.Tensor] = {}
        for fill in fills:
            if first.setdefault((fill.layer, fill.expert), fill) is fill:
                gate, up, down = expert_tensors(self._checkpoint.config, fill.layer, fill.expert)
                gate_up_rows, down_rows = self._rows(fill)
                into[gate] = gate_up_rows[: self._intermediate]
                into[up] = gate_up_rows[self._up_at : self._up_at + self._intermediate]
                into[down] = down_rows[: self._hidden]
        self._checkpoint.read(into, self._dtype, into=into, progress=progress)
        for fill in first.values():
            if self.packed:
                for rows in self._rows(fill):
                    linear_cpu().pack(rows.numpy())
        for fill in fills:
            source = first[fill.layer, fill.expert]
            if source is not fill:
                for weights in (self.gate_up[fill.layer], self.down[fill.layer]):
                    weights[fill.slot] = weights[source.slot]
            self._hold(fill)

    def export(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An expert's weights as they lie here, as views; None if no slot holds it. For `adopt` of another shard."""
        if layer not in self._held or expert not in self._held[layer]:
            return None
        slot = self._held[layer].index(expert)
        return self.gate_up[layer][slot], self.down[layer][slot]

    def adopt(self, fill: Fill, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        """Fill a slot with what another shard of the same model exported. Raises: ValueError for other shapes."""
        for weights, part in ((self.gate_up[fill.layer], gate_up), (self.down[fill.layer], down)):
            if part.numel() != weights[fill.slot].numel():
                raise ValueError(f"an expert of {part.numel()} numbers in a slot of {weights[fill.slot].numel()}")
            weights[fill.slot] = part.view(weights[fill.slot].shape)
        self._hold(fill)

    def expert_shapes(self, layer: int) -> tuple[torch.Size, torch.Size]:
        """Of one expert's two tensors as exported."""
        return self.gate_up[layer].shape[1:], self.down[layer].shape[1:]

    def release(self, layer: int, slot: int) -> None:
        """Empty a slot. Nobody may ask for it any more."""
        self._mark(layer, slot, False)
        self._held[layer][slot] = EMPTY
        for part in self._memory.get(layer, ()):
            part.release(slot)

    @property
    def num_experts(self) -> int:
        """Logical experts of a layer."""
        return self._checkpoint.config.n_routed_experts

    @property
    def num_slots(self) -> int:
        return max((len(experts) for experts in self._held.values()), default=0)

    @property
    def num_held(self) -> int:
        """Experts held, over all layers."""
        return sum(int(holds_S.sum()) for holds_S in self.holds.values())

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return next(
            (gate_up[0].nbytes + self.down[layer][0].nbytes for layer, gate_up in self.gate_up.items() if len(gate_up)),
            0,
        )

    def weight_bytes(self) -> int:
        """Bytes of the slots that hold an expert."""
        return self.num_held * self.expert_bytes

    def _rows(self, fill: Fill) -> tuple[torch.Tensor, torch.Tensor]:
        """A slot's weights with a row per output, as the checkpoint has them before they are packed."""
        if self.packed:
            gate_up, down = self._memory[fill.layer]
            return gate_up.weights[fill.slot], down.weights[fill.slot]
        return self.gate_up[fill.layer][fill.slot], self.down[fill.layer][fill.slot]

    def _hold(self, fill: Fill) -> None:
        self._held[fill.layer][fill.slot] = fill.expert
        self._mark(fill.layer, fill.slot, True)

    def _mark(self, layer: int, slot: int, holds: bool) -> None:
        self.holds[layer][slot] = holds
        if layer in self.holds_on_device:
            self.holds_on_device[layer][slot] = int(holds)
