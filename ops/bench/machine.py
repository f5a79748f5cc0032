"""The machine that a figure was taken on: what it is, and how fast it streams memory and multiplies matrices."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import pathlib
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from model.linear import Packer, linear

_STREAM_BYTES, _MATMUL_SIZE, _REPEATS = 256 * 2**20, 1024, 7


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    cpu: str
    cores: int
    memory_gib: int
    gpu: str
    """Empty where there is none."""
    python: str
    torch: str
    date: str
    """Of the measurement, ISO 8601, UTC."""
    load: float
    """Runnable processes when it began, averaged over a minute: above 0.5 the machine was not quiet."""

    @property
    def line(self) -> str:
        gpu = f", {self.gpu}" if self.gpu else ""
        return (
            f"{self.date}: {self.cpu}, {self.cores} cores, {self.memory_gib} GiB{gpu}; "
            f"Python {self.python}, torch {self.torch}; load {self.load:.1f}"
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What so many threads reach together."""

    threads: int
    bytes_per_s: float
    flops_per_s: float

    def best(self, other: Rates) -> Rates:
        """The faster of two measurements: what disturbs one only ever makes it slower."""
        return Rates(
            threads=self.threads,
            bytes_per_s=max(self.bytes_per_s, other.bytes_per_s),
            flops_per_s=max(self.flops_per_s, other.flops_per_s),
        )

    def share(self, parts: int) -> Rates:
        """Of one of `parts` that work at the same time."""
        return Rates(
            threads=self.threads // parts, bytes_per_s=self.bytes_per_s / parts, flops_per_s=self.flops_per_s / parts
        )


def describe() -> Machine:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return Machine(
        cpu=names[0] if names else platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(memory_bytes() / 2**30),
        gpu=torch.cuda.get_device_name(0) if torch.cuda.is_available() else "",
        python=platform.python_version(),
        torch=torch.__version__,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        load=os.getloadavg()[0],
    )


def memory_bytes() -> int:
    """Physical memory, in use or not."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cpu_rates(threads: int) -> Rates:
    """The best of several, in fp32: reading memory that no cache holds, and 1024³ products, by whichever way is faster
    on this processor. Sets torch's threads."""
    parts = torch.ones(threads, _STREAM_BYTES // 4 // threads)
    torch.set_num_threads(1)
    with ThreadPoolExecutor(threads) as pool:
        stream_s = _best(lambda: list(pool.map(lambda part: torch.dot(part, part), parts)))
    torch.set_num_threads(threads)
    x, weight = torch.rand(2, _MATMUL_SIZE, _MATMUL_SIZE)
    matmul_s = min(_best(functools.partial(product, x)) for product in products(weight))
    return Rates(threads=threads, bytes_per_s=parts.nbytes / stream_s, flops_per_s=2 * _MATMUL_SIZE**3 / matmul_s)


def products(weight_CH: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], ...]:
    """Ways to multiply rows `[T, H]` by a matrix: torch's, and over packed panels, as members do."""
    packer = Packer()
    packed, rows_CH = packer.matrix(*weight_CH.shape)
    rows_CH.copy_(weight_CH)
    packer.pack()
    return lambda x_TH: linear(x_TH, weight_CH), lambda x_TH: linear(x_TH, packed)


def _best(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(_REPEATS):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)
