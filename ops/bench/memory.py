"""`octet bench memory`: what a shard's process holds beside its experts' weights.

Each shard is loaded in a process of its own, by the classes that serve it, and answers calls on every layer before it
is measured. The floor is the same process before it loads, with everything imported and the CPU kernel compiled.
"""

from __future__ import annotations

import multiprocessing
import pathlib
import tempfile

from rich.console import Console
from rich.table import Table

from ops.bench.checkpoints import BENCH, write_checkpoint

_CALL_ROWS = 64


def bench_memory(model_dir: pathlib.Path | None, num_shards: int) -> None:
    """Print resident memory per shard. `None` writes and measures a random checkpoint."""
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            model_dir = pathlib.Path(scratch)
            write_checkpoint(model_dir, BENCH)
        table = Table(box=None, pad_edge=False)
        for column in ("shard", "weights MiB", "interpreter MiB", "resident MiB", "growth ÷ weights"):
            table.add_column(column, justify="right")
        for shard in range(num_shards):
            weights, before, after = _measured(model_dir, shard, num_shards)
            mib = (f"{value / 2**20:.1f}" for value in (weights, before, after))
            table.add_row(str(shard), *mib, f"{(after - before) / weights:.3f}")
    console.print(table)


def _measured(model_dir: pathlib.Path, shard: int, num_shards: int) -> tuple[int, int, int]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (str(model_dir), shard, num_shards))


def _measure(model_dir: str, shard: int, num_shards: int) -> tuple[int, int, int]:
    """Bytes of weights, and resident memory before loading and after serving."""
    import torch

    from cluster.workers.process import resident_bytes
    from experts.grouped import grouped_cpu
    from experts.shard import ExpertShard
    from model.checkpoint import Checkpoint
    from ops.local import load_slots
    from router.exchange import ExpertRows
    from router.placement import place_evenly

    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(pathlib.Path(model_dir))
    config = checkpoint.config
    placement = place_evenly(config.moe_layers, config.n_routed_experts, num_shards)
    grouped_cpu()
    before = resident_bytes()
    slots = load_slots(checkpoint, placement, shard, torch.float32, torch.device("cpu"))
    served = ExpertShard(slots)
    held = torch.tensor([slot for slot, expert in enumerate(placement.held_by(shard)[0]) if expert >= 0])
    top_k = min(config.num_experts_per_tok, len(held))
    for layer in placement.layers:
        choice = torch.stack([held[torch.randperm(len(held))[:top_k]] for _ in range(_CALL_ROWS)])
        weights = torch.rand(_CALL_ROWS, top_k)
        x_UH = torch.randn(_CALL_ROWS, config.hidden_size)
        served.serve(layer, ExpertRows(x_UH=x_UH, slots_UK=choice.int(), weights_UK=weights))
    return slots.weight_bytes(), before, resident_bytes()
