"""Linear layers, and the choice between torch's operators and the packed panels of an fp32 CPU.

Shapes: `T` rows, `H` inputs, `C` columns (outputs), `I` intermediate.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from model.host_memory import StandingArrays
from model.threads import in_parts

PANEL = 16
"""Rows of a weight matrix that a panel holds, transposed; see `model.linear_cpu`."""

_ROWS = 48
"""Whole tiles of rows, enough for a thread to be bound by arithmetic."""
_NO_BIAS = np.empty(0, np.float32)


@dataclasses.dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A weight matrix `[C, H]` in panels."""

    panels: torch.Tensor
    """`[ceil(C / 16), H, 16]`"""
    num_columns: int

    def rows(self, indices_T: torch.Tensor) -> torch.Tensor:
        """Rows of the matrix, `[T, H]`: an embedding that is tied to the head is looked up here."""
        return self.panels[indices_T // PANEL, :, indices_T % PANEL]


Matrix = torch.Tensor | PackedMatrix


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MlpWeights:
    gate_up: Matrix
    """`[2I, H]`; in panels, gate and up begin with a panel of their own."""
    down: Matrix
    """`[H, I]`"""


def linear(x_TH: torch.Tensor, weight: Matrix, bias_C: torch.Tensor | None = None) -> torch.Tensor:
    """`[T, C]`."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x_TH, weight, bias_C)
    out_TC = torch.empty(len(x_TH), weight.num_columns)
    bias = _NO_BIAS if bias_C is None else bias_C.numpy()
    arguments = (x_TH.numpy(), weight.panels.numpy(), bias, out_TC.numpy())
    compute = functools.partial(linear_cpu().linear_panels, *arguments)
    in_parts(compute, len(weight.panels), 2 * len(x_TH) * weight.panels.numel())
    return out_TC


def swiglu(x_TH: torch.Tensor, mlp: MlpWeights) -> torch.Tensor:
    """`down(silu(gate(x)) · up(x))`, `[T, H]`."""
    if isinstance(mlp.gate_up, PackedMatrix) and isinstance(mlp.down, PackedMatrix):
        return _swiglu_packed(x_TH, mlp.gate_up, mlp.down)
    gate, up = linear(x_TH, mlp.gate_up).chunk(2, dim=-1)
    return linear(F.silu(gate) * up, mlp.down)


def _swiglu_packed(x_TH: torch.Tensor, gate_up: PackedMatrix, down: PackedMatrix) -> torch.Tensor:
    """Divided by rows, which are many where it is worth it: each thread keeps its own between the two products."""
    out_TH = torch.empty_like(x_TH)
    x, out, weights = x_TH.numpy(), out_TH.numpy(), (gate_up.panels.numpy(), down.panels.numpy())

    def compute(first: int, last: int) -> None:
        rows = slice(first * _ROWS, last * _ROWS)
        linear_cpu().swiglu(x[rows], *weights, out[rows])

    numbers = gate_up.panels.numel() + down.panels.numel()
    in_parts(compute, -(-len(x_TH) // _ROWS), 2 * len(x_TH) * numbers)
    return out_TH


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrices are to be packed there."""
    return device.type == "cpu" and dtype == torch.float32


class Packer:
    """Hands out matrices in panels whose rows are yet to be filled, and packs them all in place."""

    def __init__(self) -> None:
        self._unpacked: list[torch.Tensor] = []
        self._arrays = StandingArrays()

    def matrix(self, columns: int, depth: int) -> tuple[PackedMatrix, torch.Tensor]:
        """The matrix as it will be, and its rows `[C, H]` to be filled before `pack`."""
        rows = self._rows(padded(columns), depth)
        return PackedMatrix(_panels(rows), columns), rows[:columns]

    def pair(self, columns: int, depth: int) -> tuple[PackedMatrix, tuple[torch.Tensor, torch.Tensor]]:
        """Two matrices in one; the second begins with a panel of its own."""
        half = padded(columns)
        rows = self._rows(2 * half, depth)
        return PackedMatrix(_panels(rows), 2 * half), (rows[:columns], rows[half : half + columns])

    def pack(self) -> None:
        for rows in self._unpacked:
            linear_cpu().pack(rows.numpy())
        self._unpacked.clear()

    def _rows(self, count: int, depth: int) -> torch.Tensor:
        rows = torch.from_numpy(self._arrays.zeros((count, depth)))
        self._unpacked.append(rows)
        return rows


def padded(columns: int) -> int:
    """Columns with room for a last panel that is not full."""
    return -(-columns // PANEL) * PANEL


def _panels(rows_CH: torch.Tensor) -> torch.Tensor:
    return rows_CH.view(-1, rows_CH.shape[1], PANEL)


@functools.cache
def linear_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("model.linear_cpu")
