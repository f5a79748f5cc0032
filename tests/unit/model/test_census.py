from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import pathlib
import random
from typing import Any

import pytest
import safetensors
import torch
import transformers

from model.census import (
    attention_tensors,
    expert_tensors,
    is_gate_tensor,
    mtp_attention_tensors,
    mtp_tensors,
    optional_mtp_tensors,
    required_tensors,
    take_census,
)
from model.checkpoint import Checkpoint
from model.config import ModelConfig, RopeConfig, read_config


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def random_fields(rng: random.Random, **changes: Any) -> dict[str, Any]:
    num_kv_heads = rng.randint(1, 3)
    return {
        "vocab_size": rng.randint(10, 60),
        "hidden_size": 2 * rng.randint(4, 20),
        "intermediate_size": rng.randint(4, 40),
        "moe_intermediate_size": rng.randint(3, 20),
        "num_hidden_layers": rng.randint(2, 4),
        "num_attention_heads": num_kv_heads * rng.randint(1, 3),
        "num_key_value_heads": num_kv_heads,
        "head_dim": 4 * rng.randint(1, 4),
        "n_routed_experts": rng.randint(3, 7),
        "num_experts_per_tok": rng.randint(1, 3),
        "n_shared_experts": rng.randint(1, 2),
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "attention_bias": True,
        "tie_word_embeddings": False,
    } | changes


GLM_4_6 = ModelConfig(
    vocab_size=151552,
    hidden_size=5120,
    intermediate_size=12288,
    moe_intermediate_size=1536,
    num_hidden_layers=92,
    num_attention_heads=96,
    num_key_value_heads=8,
    head_dim=128,
    n_routed_experts=160,
    num_experts_per_tok=8,
    n_shared_experts=1,
    first_k_dense_replace=3,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
    attention_bias=True,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    max_position_embeddings=202752,
    num_nextn_predict_layers=1,
    rope=RopeConfig(rope_type="default", theta=1e6, partial_rotary_factor=0.5),
    eos_token_ids=(151329,),
)


def save_with_transformers(fields: dict[str, Any], model_dir: pathlib.Path, **options: Any) -> None:
    """Writes a random model as `transformers` would, without its progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**fields)).save_pretrained(model_dir, **options)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": False},
        {"use_qk_norm": False},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 99},
    ],
    ids=str,
)
def test_the_census_lists_what_transformers_writes(
    tmp_path: pathlib.Path, rng: random.Random, changes: dict[str, Any]
) -> None:
    save_with_transformers(random_fields(rng, **changes), tmp_path)
    opened: Any = safetensors.safe_open
    with opened(tmp_path / "model.safetensors", framework="pt") as file:
        written = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    assert required_tensors(read_config(tmp_path)) == written


def test_a_sharded_checkpoint_of_transformers_opens_without_mtp(tmp_path: pathlib.Path, rng: random.Random) -> None:
    save_with_transformers(random_fields(rng, num_nextn_predict_layers=1), tmp_path, max_shard_size="1KB")
    assert not (tmp_path / "model.safetensors").exists()
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.has_mtp
    assert checkpoint.tensors.keys() == required_tensors(checkpoint.config).keys()


def test_an_attention_worker_and_the_experts_share_no_tensor(tmp_path: pathlib.Path, rng: random.Random) -> None:
    transformers.Glm4MoeConfig(**random_fields(rng), architectures=["Glm4MoeForCausalLM"]).save_pretrained(tmp_path)
    config = read_config(tmp_path)
    pools = [attention_tensors(config)]
    for layer in config.moe_layers:
        pools += [expert_tensors(config, layer, expert) for expert in range(config.n_routed_experts)]
    assert sum(map(len, pools)) == len(required_tensors(config))


def test_mtp_is_a_sparse_decoder_layer_behind_the_last_with_a_head_of_its_own() -> None:
    mtp, prefix = mtp_tensors(GLM_4_6), "model.layers.92."
    heads = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    last_layer = {name for name in required_tensors(GLM_4_6) if name.startswith("model.layers.91.")}
    layer = {name.replace("model.layers.91.", prefix) for name in last_layer}
    assert mtp.keys() == layer | {prefix + name for name in heads}
    assert mtp[prefix + "eh_proj.weight"] == (5120, 2 * 5120)
    assert not any(".experts." in name for name in mtp_attention_tensors(GLM_4_6))


def test_a_checkpoint_may_repeat_embedding_and_head_in_its_mtp_layer() -> None:
    shape, prefix = (GLM_4_6.vocab_size, GLM_4_6.hidden_size), "model.layers.92."
    expected = {prefix + "embed_tokens.weight": shape, prefix + "shared_head.head.weight": shape}
    assert optional_mtp_tensors(GLM_4_6) == expected
    assert not expected.keys() & mtp_tensors(GLM_4_6).keys()


def test_the_census_of_glm_4_6_is_the_published_one() -> None:
    census = take_census(GLM_4_6, element_bytes=2, kv_element_bytes=2)
    assert census.expert_parameters == 3 * 5120 * 1536
    assert census.expert_bytes == 2 * census.expert_parameters
    assert census.kv_bytes_per_token == 376_832
    assert census.kv_bytes_per_page(16) == 16 * 376_832
    assert (census.num_moe_layers, census.num_experts) == (89, 160)
    assert round((census.total_parameters + census.mtp_parameters) / 1e9) == 357
    assert round(census.active_parameters / 1e9) in (32, 33)


def test_the_census_counts_every_parameter_once() -> None:
    census = take_census(GLM_4_6, element_bytes=2, kv_element_bytes=2)
    assert census.total_parameters == sum(map(math.prod, required_tensors(GLM_4_6).values()))
    assert census.mtp_parameters == sum(map(math.prod, mtp_tensors(GLM_4_6).values()))


def test_an_attention_workers_gates_weigh_four_bytes_an_element() -> None:
    census = take_census(GLM_4_6, element_bytes=2, kv_element_bytes=2)
    tensors = attention_tensors(GLM_4_6)
    expected = sum(
        torch.empty(shape, dtype=torch.float32 if is_gate_tensor(name) else torch.bfloat16, device="meta").nbytes
        for name, shape in tensors.items()
    )
    assert census.attention_bytes == expected
    assert sum(map(is_gate_tensor, tensors)) == 2 * census.num_moe_layers


def test_the_fullest_shard_holds_its_ceiling_of_every_layers_experts() -> None:
    census = take_census(GLM_4_6, element_bytes=2, kv_element_bytes=2)
    assert census.shard_bytes(1) == census.routed_bytes == 89 * census.moe_layer_bytes
    assert census.shard_bytes(32) == 89 * 5 * census.expert_bytes
    assert census.shard_bytes(33) == 89 * 5 * census.expert_bytes
    assert census.shard_bytes(32, num_redundant_experts=32) == 89 * 6 * census.expert_bytes
    assert census.shard_bytes(32, mtp=True) == 90 * 5 * census.expert_bytes


def test_a_tied_embedding_is_active_as_the_output_head() -> None:
    tied = take_census(dataclasses.replace(GLM_4_6, tie_word_embeddings=True), element_bytes=2, kv_element_bytes=2)
    untied = take_census(GLM_4_6, element_bytes=2, kv_element_bytes=2)
    assert tied.active_parameters == untied.active_parameters
    assert tied.total_parameters == untied.total_parameters - 151552 * 5120
