"""Which tensors a Glm4Moe checkpoint holds, and what each pool holds of them: names, shapes, parameters, bytes.

Shapes: `V` vocabulary, `H` hidden, `I` intermediate, `E` experts, `D` head dim, `Q` and `N` query and KV heads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from model.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]

_GATE_ELEMENT_BYTES = 4
_GATE_SUFFIXES = (".mlp.gate.weight", ".mlp.gate.e_score_correction_bias")


def is_gate_tensor(name: str) -> bool:
    """Whether the tensor belongs to an expert gate, whose arithmetic is fp32 whatever the model's dtype."""
    return name.endswith(_GATE_SUFFIXES)


def attention_tensors(config: ModelConfig) -> Shapes:
    """Hugging Face name → shape of all that an attention worker (prefill or decode) holds: no routed expert, no MTP.

    `lm_head.weight` is absent where it is tied to the embedding.
    """
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= _layer_tensors(config, layer, sparse=layer in config.moe_layers)
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes |= _head_tensors(config)
    return shapes


def duplicate_tensors(config: ModelConfig) -> Shapes:
    """What a checkpoint may hold and nobody reads: the head where it is the embedding, as in `transformers`."""
    return _head_tensors(config) if config.tie_word_embeddings else {}


def expert_tensors(config: ModelConfig, layer: int, expert: int) -> Shapes:
    """Gate and up projection `[I, H]` and down projection `[H, I]` of one routed expert, of any MoE or MTP layer."""
    return _mlp_tensors(config, f"model.layers.{layer}.mlp.experts.{expert}.", config.moe_intermediate_size)


def draft_tensors(config: ModelConfig) -> Shapes:
    """What an attention worker holds besides `attention_tensors` to speculate: the first MTP layer, no routed expert.

    Empty where the config has no MTP layer.
    """
    return _mtp_layer_tensors(config, config.num_hidden_layers) if config.mtp_layers else {}


def mtp_attention_tensors(config: ModelConfig) -> Shapes:
    """Every MTP layer without its routed experts."""
    shapes: Shapes = {}
    for layer in config.mtp_layers:
        shapes |= _mtp_layer_tensors(config, layer)
    return shapes


def mtp_tensors(config: ModelConfig) -> Shapes:
    """Every tensor that a checkpoint with MTP layers must hold for them, their routed experts included.

    Empty where the config has no MTP layer. A checkpoint may leave them all out: `transformers` writes none.
    """
    return mtp_attention_tensors(config) | _experts_of(config, config.mtp_layers)


def optional_mtp_tensors(config: ModelConfig) -> Shapes:
    """Copies of the embedding and of the output head, `[V, H]`, that some checkpoints repeat in each MTP layer."""
    copies = ("embed_tokens", "shared_head.head")
    shape = (config.vocab_size, config.hidden_size)
    return {f"model.layers.{layer}.{copy}.weight": shape for layer in config.mtp_layers for copy in copies}


def required_tensors(config: ModelConfig) -> Shapes:
    """Every tensor that any checkpoint of this config holds: `attention_tensors` and all routed experts."""
    return attention_tensors(config) | _experts_of(config, config.moe_layers)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """What a model weighs, by pool. Parameters are counts; MTP is counted apart, as a checkpoint may lack it."""

    num_layers: int
    num_moe_layers: int
    num_experts: int
    """Routed experts of one MoE layer."""
    num_experts_per_token: int
    num_mtp_layers: int
    attention_parameters: int
    """Of one attention worker; each of them holds all of these."""
    expert_parameters: int
    """Of one routed expert."""
    mtp_attention_parameters: int
    """Of all MTP layers without their routed experts."""
    active_parameters: int
    """Multiplied for each token: all but the other experts and the embedding, which is looked up (if tied, it is
    the output head, and counted)."""
    attention_bytes: int
    """Of one attention worker's weights; the gates are held in fp32."""
    draft_bytes: int
    """What speculation adds to the weights of an attention worker."""
    expert_bytes: int
    kv_bytes_per_token: int
    """Over all decoder layers, and those that draft."""

    @property
    def routed_parameters(self) -> int:
        """Of all routed experts, once each."""
        return self.num_moe_layers * self.num_experts * self.expert_parameters

    @property
    def total_parameters(self) -> int:
        """Of the model without MTP."""
        return self.attention_parameters + self.routed_parameters

    @property
    def mtp_parameters(self) -> int:
        """Of the MTP layers with their routed experts."""
        return self.mtp_attention_parameters + self.num_mtp_layers * self.num_experts * self.expert_parameters

    @property
    def moe_layer_bytes(self) -> int:
        """Of one layer's routed experts, once each."""
        return self.num_experts * self.expert_bytes

    @property
    def routed_bytes(self) -> int:
        """Of all routed experts, once each."""
        return self.num_moe_layers * self.moe_layer_bytes

    def shard_bytes(self, num_shards: int, *, num_redundant_experts: int = 0, mtp: bool = False) -> int:
        """Weights of the fullest of `num_shards` shards.

        Args:
            num_redundant_experts: physical experts of a layer beyond one replica of each logical expert.
            mtp: whether the shards also hold the experts of the MTP layer that drafts.
        """
        num_slots = math.ceil((self.num_experts + num_redundant_experts) / num_shards)
        return num_slots * (self.num_moe_layers + (mtp and self.num_mtp_layers > 0)) * self.expert_bytes

    def kv_bytes_per_page(self, page_size: int) -> int:
        """Keys and values of `page_size` tokens."""
        return page_size * self.kv_bytes_per_token


def take_census(config: ModelConfig, element_bytes: int, kv_element_bytes: int, num_draft_layers: int = 0) -> Census:
    """
    Args:
        element_bytes: of a weight as served (2 for bf16), which need not be the checkpoint's own.
        kv_element_bytes: of an element of the KV cache.
        num_draft_layers: MTP layers that draft and keep keys and values.
    """
    attention = attention_tensors(config)
    expert_parameters = _parameters(expert_tensors(config, 0, 0).values())
    attention_parameters = _parameters(attention.values())
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    num_moe_layers = len(config.moe_layers)
    return Census(
        num_layers=config.num_hidden_layers,
        num_moe_layers=num_moe_layers,
        num_experts=config.n_routed_experts,
        num_experts_per_token=config.num_experts_per_tok,
        num_mtp_layers=config.num_nextn_predict_layers,
        attention_parameters=attention_parameters,
        expert_parameters=expert_parameters,
        mtp_attention_parameters=_parameters(mtp_attention_tensors(config).values()),
        active_parameters=attention_parameters
        - looked_up
        + num_moe_layers * config.num_experts_per_tok * expert_parameters,
        attention_bytes=_bytes(attention, element_bytes),
        draft_bytes=_bytes(draft_tensors(config), element_bytes),
        expert_bytes=expert_parameters * element_bytes,
        kv_bytes_per_token=config.kv_bytes_per_token(kv_element_bytes, num_draft_layers),
    )


def _head_tensors(config: ModelConfig) -> Shapes:
    return {"lm_head.weight": (config.vocab_size, config.hidden_size)}


def _mtp_layer_tensors(config: ModelConfig, layer: int) -> Shapes:
    prefix = f"model.layers.{layer}."
    shapes: Shapes = {
        prefix + norm + ".weight": (config.hidden_size,) for norm in ("enorm", "hnorm", "shared_head.norm")
    }
    shapes[prefix + "eh_proj.weight"] = (config.hidden_size, 2 * config.hidden_size)
    return shapes | _layer_tensors(config, layer, sparse=True)


def _layer_tensors(config: ModelConfig, layer: int, *, sparse: bool) -> Shapes:
    """A decoder layer without its routed experts."""
    prefix = f"model.layers.{layer}."
    shapes: Shapes = {
        prefix + "input_layernorm.weight": (config.hidden_size,),
        prefix + "post_attention_layernorm.weight": (config.hidden_size,),
    }
    shapes |= _self_attention_tensors(config, prefix + "self_attn.")
    if not sparse:
        return shapes | _mlp_tensors(config, prefix + "mlp.", config.intermediate_size)
    shapes[prefix + "mlp.gate.weight"] = (config.n_routed_experts, config.hidden_size)
    shapes[prefix + "mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
    width = config.moe_intermediate_size * config.n_shared_experts
    return shapes | _mlp_tensors(config, prefix + "mlp.shared_experts.", width)


def _self_attention_tensors(config: ModelConfig, prefix: str) -> Shapes:
    query_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim
    widths = {"q": query_width, "k": kv_width, "v": kv_width}
    shapes: Shapes = {f"{prefix}{part}_proj.weight": (width, config.hidden_size) for part, width in widths.items()}
    shapes[prefix + "o_proj.weight"] = (config.hidden_size, query_width)
    if config.attention_bias:
        shapes |= {f"{prefix}{part}_proj.bias": (width,) for part, width in widths.items()}
    if config.use_qk_norm:
        shapes |= {f"{prefix}{part}_norm.weight": (config.head_dim,) for part in "qk"}
    return shapes


def _mlp_tensors(config: ModelConfig, prefix: str, width: int) -> Shapes:
    return {
        prefix + "gate_proj.weight": (width, config.hidden_size),
        prefix + "up_proj.weight": (width, config.hidden_size),
        prefix + "down_proj.weight": (config.hidden_size, width),
    }


def _experts_of(config: ModelConfig, layers: Iterable[int]) -> Shapes:
    shapes: Shapes = {}
    for layer in layers:
        for expert in range(config.n_routed_experts):
            shapes |= expert_tensors(config, layer, expert)
    return shapes


def _parameters(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)


def _bytes(shapes: Shapes, element_bytes: int) -> int:
    return sum(
        math.prod(shape) * (_GATE_ELEMENT_BYTES if is_gate_tensor(name) else element_bytes)
        for name, shape in shapes.items()
    )
