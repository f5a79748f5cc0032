"""RMSNorm, and the choice between torch's operators and the compiled loops of an fp32 CPU."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Normalised over the last dim in fp32, then scaled in the weights' own precision (as the reference does)."""
    if x.dim() == 2 and x.device.type == "cpu" and x.dtype == torch.float32:
        normalised: torch.Tensor = _fused_cpu().rms_norm(x, weight, eps)
        return normalised
    x_fp32 = x.float()
    return weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def warm_up(device: torch.device) -> None:
    """Have the compiled loops ready, where they are used."""
    if device.type == "cpu":
        _fused_cpu().warm_up()


@functools.cache
def _fused_cpu() -> ModuleType:
    # Imported here, so that GPU workers do without numba.
    return importlib.import_module("model.fused_cpu")
