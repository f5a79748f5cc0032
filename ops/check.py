"""`octet check`: validate a checkpoint and take its census, per pool."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.plan import ServingPlan
from cluster.planning import make_plan
from model.checkpoint import Checkpoint
from octet.config import OctetConfig
from router.transition import shard_slots


def check(config: OctetConfig, console: Console | None = None) -> None:
    """Raises: CheckpointError, ConfigError."""
    plan = make_plan(config)
    has_mtp = Checkpoint.open(pathlib.Path(plan.model_dir)).has_mtp
    console = console or Console()
    console.print(f"[bold]{escape(plan.model_dir)}[/]: a valid Glm4Moe checkpoint", highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in _rows(plan, has_mtp):
        table.add_row(*row)
    console.print(table, highlight=False)


def _rows(plan: ServingPlan, has_mtp: bool) -> Iterator[tuple[str, str]]:
    model, census, pools = plan.model, plan.census, plan.config.pools
    speculation = plan.config.speculation
    attention_bytes = census.attention_bytes + speculation.num_draft_layers * census.draft_bytes
    shard_bytes = census.shard_bytes(pools.experts.size, mtp=speculation.num_draft_layers > 0)
    experts = f"{model.n_routed_experts} per layer, top-{model.num_experts_per_tok}, {_size(census.expert_bytes)} each"
    yield "layers", f"{model.num_hidden_layers} ({len(model.moe_layers)} with experts)"
    yield "experts", experts
    yield "parameters", f"{census.total_parameters:,}, {census.active_parameters:,} active per token"
    drafts = f", up to {speculation.num_speculative_tokens} drafts a step" if speculation.num_draft_layers else ""
    yield "MTP head", f"present{drafts}" if has_mtp else "absent: no speculation"
    element = "fp32" if plan.device == "cpu" else "bf16"
    for name, pool, pages in (
        ("prefill pool", pools.prefill, plan.prefill_pages),
        ("decode pool", pools.decode, plan.decode_pages),
    ):
        yield name, f"{pool.size} × {_size(attention_bytes)} of weights ({element})"
        page_size = plan.config.kv.page_size
        yield "", f"{pages} pages of {page_size} tokens = {_size(pages * census.kv_bytes_per_page(page_size))}"
    yield "expert pool", f"{pools.experts.size} × at most {_size(shard_bytes)} of weights"
    slots = max(shard_slots(model.n_routed_experts, pools.experts.redundant_experts, pools.experts.size))
    yield "", f"{slots} slots per layer and shard, {_size(census.moe_layer_bytes)} per layer"
    yield "KV cache", f"{census.kv_bytes_per_token:,} bytes per token"
    yield "context", f"{plan.max_model_len:,} of {model.max_position_embeddings:,} tokens"


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
