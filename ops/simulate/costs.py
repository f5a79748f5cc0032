"""How long things take: linear costs, from a machine's rates, or fitted to what `octet bench breakdown` measured.

A step of an attention worker costs its own part (`decode_*`, `prefill_*`, over all layers), and for each MoE layer the
way of the rows (`exchange_*`) and the fullest shard's call (`expert_*`); waiting for shards comes on top
(`contention`). Where members share cores, these are times of members that have as many as they can use, and the way of
the rows is computing like any other: packing, sending and adding up.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from experts.shard import PIECE_OPERATIONS
from octet.errors import ConfigError
from ops.simulate.shape import Shape

SCHEMA = "octet.breakdown/1"
_MEASURED = {
    "attention": ("fixed_s", "per_sequence_s", "per_attended_s"),
    "expert": ("fixed_s",),
    "exchange": ("fixed_s", "per_byte_s"),
    "handoff": ("fixed_s", "per_byte_s"),
    "processor": ("decode_cores",),
    "processor.prefill": ("fixed_s", "per_token_s", "per_attended_s"),
    "processor.expert": ("fixed_s", "per_expert_s", "per_pair_s"),
}
"""What `calibrated` takes of a breakdown's costs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, each for the thing named."""

    decode_fixed_s: float
    decode_per_sequence_s: float
    decode_per_attended_s: float
    """Per position attended to: the contexts of all sequences added up."""
    prefill_fixed_s: float
    prefill_per_token_s: float
    prefill_per_attended_s: float
    expert_fixed_s: float
    expert_per_read_s: float
    """Per expert whose weights are read."""
    expert_per_row_s: float
    expert_piece_s: float
    """After so long within a prefill frame, a shard lets decode frames pass; infinite if it never does."""
    reads_overlap: bool
    """A call takes as long as the longer of reading and computing, not both added up."""
    exchange_fixed_s: float
    """There and back."""
    exchange_per_byte_s: float
    """Per byte there and back."""
    handoff_fixed_s: float
    handoff_per_byte_s: float
    worker_start_s: float
    """From the order until a new attention worker serves."""
    shard_start_s: float
    """The same of a shard, its slots filled."""
    slot_fill_s: float
    """To fill one slot of one layer on a shard that serves."""
    cores: int = 0
    """All members share so many; 0 if each has a machine of its own."""
    worker_threads: int = 1
    """Of an attention worker; a shard has one. A prefill worker takes as many cores while it computes."""
    decode_cores: float = 1.0
    """That a decode worker takes, in the mean, while it computes."""
    turn_s: float = 0.0
    """For which a thread keeps a core that others want, where cores are shared."""
    others_cores: float = 0.0
    """Cores that processes which are no members always take, where they are shared: Ray's own, the controller."""
    others_per_token_s: float = 0.0
    """Processor time that they take for each new token: frontend, and clients on the same machine."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one member's device reaches, and the network between members."""

    flops_per_s: float
    attention_flops_per_s: float
    bytes_per_s: float
    call_s: float
    """Of one layer's call that does nothing."""
    way_s: float
    """Of one layer's rows there and back, empty."""
    way_bytes_per_s: float
    link_bytes_per_s: float
    """Of hand-offs."""
    process_s: float
    """To place and start a process."""
    load_bytes_per_s: float
    fill_bytes_per_s: float
    """For slots filled while serving."""
    piece_operations: float = math.inf
    """After so many within a prefill frame, a shard lets decode frames pass."""


H100 = Rates(
    # Dense bf16 peak is 989 TFLOP/s; grouped GEMMs and linear layers of these sizes reach less than half of it.
    flops_per_s=0.45 * 989e12,
    attention_flops_per_s=0.5 * 989e12,
    # HBM3: 3.35 TB/s.
    bytes_per_s=0.8 * 3.35e12,
    call_s=10e-6,
    # DeepEP's README: 77 µs + 114 µs for dispatch and combine of 128 tokens of 7168 on 8 H800, of which about 110 µs
    # are the bytes at its 98 to 127 GB/s.
    way_s=80e-6,
    # A network adapter of 400 Gb/s per GPU, both directions at once.
    way_bytes_per_s=100e9,
    link_bytes_per_s=40e9,
    process_s=60.0,
    load_bytes_per_s=2e9,
    fill_bytes_per_s=5e9,
)
"""Assumptions, not measurements: no Octet has run on an H100 yet."""

CPU = Rates(
    flops_per_s=64e9,
    attention_flops_per_s=20e9,
    bytes_per_s=11e9,
    call_s=0.1e-3,
    way_s=0.6e-3,
    way_bytes_per_s=1e9,
    link_bytes_per_s=0.5e9,
    process_s=8.0,
    load_bytes_per_s=0.3e9,
    fill_bytes_per_s=0.3e9,
    piece_operations=PIECE_OPERATIONS,
)
"""One core with AVX2 in fp32. Calibrate: a CPU's own costs are dominated by what these rates leave out."""


def from_rates(rates: Rates, shape: Shape, slots_per_layer: int, cores: int = 0) -> Costs:
    """
    Args:
        slots_per_layer: that a new shard fills before it serves.
    """
    shard_bytes = slots_per_layer * len(shape.moe_layers) * shape.expert_bytes
    return Costs(
        decode_fixed_s=shape.worker_read_bytes / rates.bytes_per_s,
        decode_per_sequence_s=shape.worker_flops / rates.flops_per_s,
        decode_per_attended_s=shape.kv_bytes / rates.bytes_per_s,
        prefill_fixed_s=rates.call_s * shape.num_layers,
        prefill_per_token_s=shape.worker_flops / rates.flops_per_s,
        prefill_per_attended_s=shape.attention_flops / rates.attention_flops_per_s,
        expert_fixed_s=rates.call_s,
        expert_per_read_s=shape.expert_bytes / rates.bytes_per_s,
        expert_per_row_s=shape.expert_flops / rates.flops_per_s,
        expert_piece_s=rates.piece_operations / rates.flops_per_s,
        reads_overlap=True,
        exchange_fixed_s=rates.way_s,
        exchange_per_byte_s=1 / rates.way_bytes_per_s,
        handoff_fixed_s=5e-3,
        handoff_per_byte_s=1 / rates.link_bytes_per_s,
        worker_start_s=rates.process_s + shape.worker_bytes / rates.load_bytes_per_s,
        shard_start_s=rates.process_s + shard_bytes / rates.load_bytes_per_s,
        slot_fill_s=shape.expert_bytes / rates.fill_bytes_per_s,
        cores=cores,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What a breakdown has measured, on one prefill worker, one decode worker and so many shards."""

    costs: Mapping[str, Any]
    """As `octet bench breakdown --json` writes them."""
    worker_threads: int
    num_shards: int
    turn_s: float


def calibrated(costs: Costs, measured: Calibration, shape: Shape) -> Costs:
    """`costs` with what was measured in place of what it covers.

    Decode steps of one worker, which shares its cores with shards that wait while it computes, are taken as long as
    they were. Prefill and shards compute at the same time there, so their parts are taken from the processor time that
    each used: a shard's on its thread, and the prefill worker's on all of its threads alike.
    """
    attention, exchange, handoff, processor = (
        measured.costs[name] for name in ("attention", "exchange", "handoff", "processor")
    )
    prefill, expert = processor["prefill"], processor["expert"]
    threads = measured.worker_threads
    # The rows' way is simulated by itself.
    num_layers, top_k = len(shape.moe_layers), shape.experts_per_token
    way_bytes = min(top_k, measured.num_shards) * 2 * shape.hidden_bytes
    way_per_token_s = num_layers * way_bytes * exchange["per_byte_s"]
    # A shard's receiving and replying are part of the way in what a round took, and of the call in processor time.
    way_fixed_s = max(0.0, exchange["fixed_s"] - (expert["fixed_s"] - measured.costs["expert"]["fixed_s"]))
    return dataclasses.replace(
        costs,
        decode_fixed_s=attention["fixed_s"],
        decode_per_sequence_s=attention["per_sequence_s"],
        decode_per_attended_s=attention["per_attended_s"],
        prefill_fixed_s=max(0.0, prefill["fixed_s"] / threads - num_layers * way_fixed_s),
        prefill_per_token_s=max(0.0, prefill["per_token_s"] / threads - way_per_token_s),
        prefill_per_attended_s=prefill["per_attended_s"] / threads,
        expert_fixed_s=expert["fixed_s"],
        expert_per_read_s=expert["per_expert_s"],
        expert_per_row_s=expert["per_pair_s"],
        expert_piece_s=expert["per_pair_s"] * PIECE_OPERATIONS / shape.expert_flops,
        reads_overlap=False,
        exchange_fixed_s=way_fixed_s,
        exchange_per_byte_s=exchange["per_byte_s"],
        handoff_fixed_s=handoff["fixed_s"],
        handoff_per_byte_s=handoff["per_byte_s"],
        worker_threads=threads,
        decode_cores=processor["decode_cores"],
        turn_s=measured.turn_s,
    )


def read_calibration(file: pathlib.Path, shape: Shape) -> Calibration:
    """What `octet bench breakdown --json` wrote.

    Raises: ConfigError if the file is not such a report, or is of another model.
    """
    try:
        report = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("--calibrate", str(file), "what `octet bench breakdown --json` writes", str(error)) from error
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ConfigError("--calibrate", str(file), f"schema {SCHEMA}", "write it anew with `octet bench breakdown`")

    def number(path: str, at_least: float = 0) -> Any:
        found: Any = report
        for name in path.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if isinstance(found, bool) or not isinstance(found, int | float) or not at_least <= found < math.inf:
            wanted = f"a number of at least {at_least:g}"
            raise ConfigError("--calibrate", f"{file}: {path} {found!r}", wanted, "write it anew, by this version")
        return found

    model = (number("model.moe_layers"), number("model.experts"))
    if model != (len(shape.moe_layers), shape.num_experts):
        found = f"a model of {model[0]} MoE layers with {model[1]} experts"
        raise ConfigError("--calibrate", found, f"{len(shape.moe_layers)} with {shape.num_experts}, as in --model")
    for part, names in _MEASURED.items():
        for name in names:
            number(f"costs.{part}.{name}")
    return Calibration(
        costs=report["costs"],
        worker_threads=number("rates.decode_worker.threads", at_least=1),
        num_shards=_num_shards(file, report),
        turn_s=number("turn_s"),
    )


def _num_shards(file: pathlib.Path, report: dict[str, Any]) -> int:
    """Of `1 prefill + 1 decode + 2 shards, …`. Raises: ConfigError."""
    pools = report.get("pools")
    found = re.search(r"\b([1-9]\d*) shards\b", str(pools))
    if found is None:
        raise ConfigError("--calibrate", f"{file}: pools {pools!r}", "a number of shards")
    return int(found[1])
