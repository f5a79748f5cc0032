"""What a device reaches by itself: the rates that its kernels are measured against, and how calls are timed there."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable

import torch

_WARM_UP, _REPEATS = 3, 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRates:
    bytes_per_s: float
    """Read and written by a copy that no cache holds."""
    flops_per_s: float
    """Of one large product in the dtype of the weights."""


def measure_rates(device: torch.device, dtype: torch.dtype, copy_bytes: int, matmul_size: int) -> DeviceRates:
    return DeviceRates(
        bytes_per_s=2 * copy_bytes / _copy_s(device, dtype, copy_bytes),
        flops_per_s=2 * matmul_size**3 / _matmul_s(device, dtype, matmul_size),
    )


def _copy_s(device: torch.device, dtype: torch.dtype, num_bytes: int) -> float:
    source = torch.ones(num_bytes // dtype.itemsize, dtype=dtype, device=device)
    target = torch.empty_like(source)
    return seconds_per_call(lambda _: target.copy_(source), 3, device)


def _matmul_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    x = torch.randn(size, size, dtype=dtype, device=device)
    return seconds_per_call(lambda _: x @ x, 3, device)


@torch.inference_mode()
def seconds_per_call(call: Callable[[int], object], calls: int, device: torch.device) -> float:
    """The median of five runs of `call(0) … call(calls - 1)`, each as long as its calls take the device, per call."""
    for index in range(min(_WARM_UP, calls)):
        call(index)
    times = []
    for _ in range(_REPEATS):
        _finish(device)
        start_s = time.perf_counter()
        for index in range(calls):
            call(index)
        _finish(device)
        times.append((time.perf_counter() - start_s) / calls)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
