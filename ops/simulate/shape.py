"""The size of the model that is simulated."""

from __future__ import annotations

import dataclasses
import pathlib

from cluster.planning import EMBEDDED_MODEL
from model.census import take_census
from model.config import ModelConfig, RopeConfig, read_config
from octet.errors import ConfigError

GLM_4_6 = ModelConfig(
    vocab_size=151_552,
    hidden_size=5120,
    intermediate_size=12_288,
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
    max_position_embeddings=202_752,
    num_nextn_predict_layers=1,
    rope=RopeConfig(rope_type="default", theta=1e6, partial_rotary_factor=0.5),
    eos_token_ids=(151_329,),
)
_NAMES = {"glm-4.6": GLM_4_6}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What costs depend on. Bytes and floating-point operations (flops) are of the model as served."""

    num_layers: int
    moe_layers: range
    num_experts: int
    experts_per_token: int
    hidden_bytes: int
    """Of one row on its way to an expert."""
    worker_bytes: int
    """Weights of an attention worker, the embedding included."""
    worker_read_bytes: int
    """Of these, what every step reads."""
    worker_flops: float
    """Of an attention worker, per token, without attention itself."""
    attention_flops: float
    """Per token and position that it attends to, all layers."""
    kv_bytes: int
    """Per token, all layers."""
    expert_bytes: int
    expert_flops: float
    """Per row."""


def shape_of(model: str, element_bytes: int) -> Shape:
    """Of a name (`glm-4.6`, `embedded`), or of a Hugging Face model directory. Raises: ConfigError, CheckpointError."""
    if model in _NAMES:
        return shape(_NAMES[model], element_bytes)
    model_dir = EMBEDDED_MODEL if model == "embedded" else pathlib.Path(model)
    if not model_dir.is_dir():
        raise ConfigError("--model", model, f"a model directory, or one of {', '.join(_NAMES)}, embedded")
    return shape(read_config(model_dir), element_bytes)


def shape(model: ModelConfig, element_bytes: int) -> Shape:
    census = take_census(model, element_bytes, element_bytes)
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    return Shape(
        num_layers=model.num_hidden_layers,
        moe_layers=model.moe_layers,
        num_experts=model.n_routed_experts,
        experts_per_token=model.num_experts_per_tok,
        hidden_bytes=model.hidden_size * element_bytes,
        worker_bytes=census.attention_bytes,
        worker_read_bytes=census.attention_bytes - embedding * element_bytes,
        worker_flops=2.0 * (census.attention_parameters - embedding),
        attention_flops=4.0 * model.num_attention_heads * model.head_dim * model.num_hidden_layers,
        kv_bytes=census.kv_bytes_per_token,
        expert_bytes=census.expert_bytes,
        expert_flops=2.0 * census.expert_parameters,
    )
