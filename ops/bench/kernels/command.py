"""`octet bench kernels`: the shapes of GLM-4.6 on a GPU; a tiny layer on a CPU, where only the code is exercised."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch
from rich.console import Console
from rich.table import Table

from octet.errors import ConfigError
from ops.bench.kernels.device import DeviceRates, measure_rates
from ops.bench.kernels.layer import GLM_4_6, TINY, LayerShape
from ops.bench.kernels.measure import Kernel, attention_kernel, expert_kernels, routing_kernels
from ops.bench.kernels.step import step_kernels
from ops.bench.machine import Machine, describe

SCHEMA = "octet.kernels/1"
GOALS = "goals: experts 75% of the matmul rate at 6,144 tokens and 80% of the bandwidth at 64 to 256, attention 80%"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    shape: LayerShape
    dtype: torch.dtype
    token_counts: tuple[int, ...]
    sequences: int
    context: int
    shards: int
    copy_bytes: int
    matmul_size: int


_OF_GPU = Sizes(
    shape=GLM_4_6,
    dtype=torch.bfloat16,
    token_counts=(64, 128, 256, 6144),
    sequences=64,
    context=4096,
    shards=4,
    copy_bytes=4 * 2**30,
    matmul_size=8192,
)
_OF_CPU = Sizes(
    shape=TINY,
    dtype=torch.float32,
    token_counts=(16, 64),
    sequences=4,
    context=100,
    shards=2,
    copy_bytes=64 * 2**20,
    matmul_size=512,
)
_MOST_LAYERS = 6


def bench_kernels(device_name: str, num_layers: int | None, json_file: pathlib.Path | None) -> None:
    """Print each kernel's time and its share of what the device reaches; with `json_file`, write the same there.

    Args:
        num_layers: that take turns; None as many as fit beside the largest step, at most 6.

    Raises: ConfigError if there is no such device.
    """
    device, sizes = _device(device_name)
    machine = describe()
    rates = measure_rates(device, sizes.dtype, sizes.copy_bytes, sizes.matmul_size)
    layers = num_layers or _layers_that_fit(sizes, device)
    step = (sizes.shape, rates, sizes.sequences, sizes.context, layers, sizes.dtype, device)
    kernels = [
        *expert_kernels(sizes.shape, rates, sizes.token_counts, layers, sizes.dtype, device),
        attention_kernel(sizes.shape, rates, sizes.sequences, sizes.context, layers, sizes.dtype, device),
        *(step_kernels(*step) if device.type == "cuda" else ()),
        *routing_kernels(sizes.shape, sizes.token_counts, sizes.shards, sizes.dtype, device),
    ]
    _print(machine, sizes, layers, rates, kernels, device)
    if json_file is not None:
        report = {
            "schema": SCHEMA,
            "machine": dataclasses.asdict(machine),
            "device": device.type,
            "shape": dataclasses.asdict(sizes.shape),
            "layers": layers,
            "rates": dataclasses.asdict(rates),
            "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        }
        json_file.write_text(json.dumps(report, indent=2) + "\n")


def _device(name: str) -> tuple[torch.device, Sizes]:
    if name == "cpu":
        return torch.device("cpu"), _OF_CPU
    if name != "cuda" or not torch.cuda.is_available():
        found = "no GPU" if name == "cuda" else repr(name)
        raise ConfigError("bench kernels --device", found, "cuda on a machine with a GPU, or cpu")
    return torch.device("cuda"), _OF_GPU


def _layers_that_fit(sizes: Sizes, device: torch.device) -> int:
    """Experts' weights may take half of what is free; keys, activations and work space have the rest."""
    if device.type == "cpu":
        return 2
    free_bytes, _ = torch.cuda.mem_get_info(device)
    layer_bytes = sizes.shape.experts * sizes.shape.expert_bytes(sizes.dtype)
    return max(1, min(_MOST_LAYERS, free_bytes // 2 // layer_bytes))


def _print(
    machine: Machine, sizes: Sizes, layers: int, rates: DeviceRates, kernels: list[Kernel], device: torch.device
) -> None:
    console = Console(highlight=False)
    console.print(machine.line)
    shape = sizes.shape
    console.print(
        f"{layers} layers of {shape.experts} experts of {shape.hidden}×{shape.intermediate}, "
        f"top-{shape.experts_per_token}, {str(sizes.dtype).removeprefix('torch.')} on {device.type}: "
        f"copies at {rates.bytes_per_s / 1e9:.0f} GB/s, products at {rates.flops_per_s / 1e12:.2f} TFLOP/s"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("kernel", "size", "µs per layer", "of bandwidth", "of matmul rate"):
        table.add_column(column, justify="left" if column == "kernel" else "right")
    for kernel in kernels:
        table.add_row(
            kernel.name,
            kernel.size,
            f"{kernel.seconds * 1e6:.0f}",
            "" if kernel.bandwidth_share is None else f"{kernel.bandwidth_share:.0%}",
            "" if kernel.matmul_share is None else f"{kernel.matmul_share:.0%}",
        )
    console.print(table)
    if device.type == "cpu":
        console.print("a tiny layer on a CPU: the code was exercised, nothing was measured")
    else:
        console.print(GOALS)
