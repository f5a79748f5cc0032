"""Decides and checks what a cluster is going to be, before any process of it starts."""

from __future__ import annotations

import os
import pathlib
import re

import numpy as np

from cluster.plan import ServingPlan
from model.census import take_census
from model.checkpoint import Checkpoint
from model.config import ModelConfig, read_generation_defaults
from octet.config import ExpertPoolConfig, OctetConfig
from octet.errors import ConfigError
from octet.ids import Epoch, WorkerId
from octet.secret import ClusterSecret
from router.balancing.planner import plan as plan_placement
from router.balancing.topology import Budget, Topology
from router.placement import place_evenly
from router.routing import Routing
from router.transition import shard_slots, with_capacity

EMBEDDED_MODEL = pathlib.Path(__file__).resolve().parent.parent / "model" / "embedded"
_CPU_ELEMENT_BYTES = 4
_GPU_ELEMENT_BYTES = 2
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def _not_a_hub(path: str | None) -> str:
    """What to do about a path that looks like a model's name on a hub."""
    if not _HUB_ID.fullmatch(path or ""):
        return ""
    return f"models are not downloaded: first `hf download {path} --local-dir DIRECTORY`"


def make_plan(config: OctetConfig) -> ServingPlan:
    """Open and check the checkpoint, and size the pools.

    Raises: CheckpointError, ConfigError.
    """
    model_dir = pathlib.Path(config.model.path).expanduser().resolve() if config.model.path else EMBEDDED_MODEL
    if not model_dir.is_dir():
        raise ConfigError("model.path", str(model_dir), "a Hugging Face model directory", _not_a_hub(config.model.path))
    checkpoint = Checkpoint.open(model_dir)
    model = checkpoint.config
    device = _device(config)
    element_bytes = _CPU_ELEMENT_BYTES if device == "cpu" else _GPU_ELEMENT_BYTES
    num_draft_layers = _draft_layers(config, checkpoint)
    page_bytes = model.kv_bytes_per_token(element_bytes, num_draft_layers) * config.kv.page_size
    max_model_len = config.model.max_model_len or model.max_position_embeddings
    prefill_pages = config.kv.prefill_pages or _pages(config, page_bytes, max_model_len, config.prefill.max_requests)
    decode_pages = config.kv.decode_pages or _pages(config, page_bytes, max_model_len, config.decode.max_batch)
    return ServingPlan(
        config=config,
        model_dir=str(model_dir),
        model=model,
        generation=read_generation_defaults(model_dir),
        census=take_census(model, element_bytes, element_bytes, num_draft_layers),
        device=device,
        routing=first_routing(config.pools.experts, model, num_draft_layers, device),
        prefill_pages=prefill_pages,
        decode_pages=decode_pages,
        max_model_len=_context(config, model, min(prefill_pages, decode_pages) * config.kv.page_size),
        threads=_threads(config),
        secret=ClusterSecret.draw(),
    )


def first_routing(pool: ExpertPoolConfig, model: ModelConfig, num_draft_layers: int, device: str) -> Routing:
    """Every expert once in even runs, and where there are redundant slots, replicas as for equal loads.

    Raises: ConfigError if the shards have no room for the experts.
    """
    num_experts, num_shards = model.n_routed_experts, pool.size
    layers = model.expert_layers(num_draft_layers)
    if num_shards > num_experts:
        raise ConfigError("pools.experts.size", num_shards, f"at most the model's {num_experts} experts")
    slots = shard_slots(num_experts, pool.redundant_experts, num_shards)
    placement = place_evenly(layers, num_experts, num_shards)
    if pool.redundant_experts:
        placement = plan_placement(
            np.ones((len(layers), num_experts)), Topology(slots=slots), Budget(), None, layers
        ).placement
    capacity = pool.slots_per_shard or (num_experts if device == "cpu" else max(slots))
    if capacity < max(slots):
        raise ConfigError("pools.experts.slots_per_shard", capacity, f"at least the {max(slots)} that are filled")
    shards = tuple(WorkerId(f"experts-{number}") for number in range(num_shards))
    return Routing(epoch=Epoch(1), shards=shards, placement=with_capacity(placement, min(capacity, num_experts)))


def _draft_layers(config: OctetConfig, checkpoint: Checkpoint) -> int:
    """Raises: ConfigError if the checkpoint has no head to speculate with."""
    wanted = config.speculation.num_speculative_tokens
    if wanted > 0 and not checkpoint.has_mtp:
        raise ConfigError(
            "speculation.num_speculative_tokens",
            wanted,
            f"0, as {checkpoint.model_dir} has no MTP layer",
            f"take a checkpoint with the tensors of model.layers.{checkpoint.config.num_hidden_layers}",
        )
    return config.speculation.num_draft_layers


def _device(config: OctetConfig) -> str:
    pools = config.pools
    with_gpu = {name for name in ("prefill", "decode", "experts") if getattr(pools, name).num_gpus > 0}
    if with_gpu and len(with_gpu) < 3:
        missing = sorted({"prefill", "decode", "experts"} - with_gpu)
        raise ConfigError(
            f"pools.{missing[0]}.num_gpus", 0, "more than 0, as in the other pools", "mix no CPU and GPU pools"
        )
    return "cuda" if with_gpu else "cpu"


def _pages(config: OctetConfig, page_bytes: int, max_model_len: int, max_sequences: int) -> int:
    """As many as fit the memory, but not more than could ever be used."""
    affordable = int(config.kv.memory_gib * 2**30) // page_bytes
    useful = -(-max_model_len // config.kv.page_size) * max_sequences
    if affordable < 1:
        raise ConfigError("kv.memory_gib", config.kv.memory_gib, f"room for one page of {page_bytes} bytes")
    return min(affordable, useful)


def _context(config: OctetConfig, model: ModelConfig, kv_tokens: int) -> int:
    """The longest sequence served: what the model allows, and what the smaller pool's pages hold."""
    wanted = config.model.max_model_len
    if wanted is None:
        return min(model.max_position_embeddings, kv_tokens)
    if wanted > model.max_position_embeddings:
        raise ConfigError("model.max_model_len", wanted, f"at most the model's {model.max_position_embeddings}")
    if wanted > kv_tokens:
        raise ConfigError(
            "model.max_model_len",
            wanted,
            f"at most the {kv_tokens} tokens that the KV pages hold",
            "give kv more memory",
        )
    return wanted


def _threads(config: OctetConfig) -> dict[str, int]:
    """What a pool says, else as many as the Ray CPUs that a member holds, else an even share of this machine's cores.

    Pools that share a machine must not fight for its cores. But prefill workers may have them all, and so may decode
    workers: shards wait while they compute, and threads of theirs that find no core are not waited for
    (`model.team_cpu`, `model.threads`).
    """
    pools = {name: getattr(config.pools, name) for name in ("prefill", "decode", "experts")}
    cores, members = len(os.sched_getaffinity(0)), sum(pool.size for pool in pools.values())
    shares = {name: max(1, cores // (members if name == "experts" else pool.size)) for name, pool in pools.items()}
    return {
        name: pool.threads or (int(pool.num_cpus) if pool.num_cpus >= 1 else shares[name])
        for name, pool in pools.items()
    }
