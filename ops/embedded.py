"""Make the embedded model: a small Glm4Moe checkpoint with random weights, the same bytes on every run.

It has every part that GLM-4.6 has (dense and MoE layers, a shared expert, q/k norms, biases, an MTP head, a chat
template) and says nothing of sense. Run it as `python -m ops.embedded [OUT_DIR]`.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.torch
import tokenizers
import torch

DEFAULT_DIR = pathlib.Path(__file__).parents[1] / "model" / "embedded"
CORPUS_FILE = pathlib.Path(__file__).with_name("embedded_corpus.txt")

SEED = 8
VOCAB_SIZE = 1024
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
FIRST_SPECIAL_ID = VOCAB_SIZE - len(SPECIAL_TOKENS)
PAD_ID, *_ = EOS_IDS = [
    FIRST_SPECIAL_ID + SPECIAL_TOKENS.index(token) for token in ("<|endoftext|>", "<|user|>", "<|observation|>")
]

CONFIG: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": EOS_IDS,
    "first_k_dense_replace": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 4096,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 32,
    "n_group": 1,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": PAD_ID,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_qk_norm": True,
    "vocab_size": VOCAB_SIZE,
}

GENERATION_CONFIG: dict[str, Any] = {"do_sample": False, "eos_token_id": EOS_IDS, "pad_token_id": PAD_ID}

TOKENIZER_CONFIG: dict[str, Any] = {
    "additional_special_tokens": list(SPECIAL_TOKENS),
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|endoftext|>",
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": "<|endoftext|>",
    "padding_side": "left",
    "tokenizer_class": "PreTrainedTokenizerFast",
}

CHAT_TEMPLATE = r"""[gMASK]<sop>
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'observation'] %}
        {{- raise_exception("role '" + message.role + "' is not system, user, assistant or observation") }}
    {%- endif %}
    {{- '<|' + message.role + '|>\n' + message.content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\n' }}
{%- endif %}
"""


def write(out_dir: pathlib.Path) -> None:
    """Write the checkpoint into `out_dir`, which is made if it is not there.

    Raises: OSError.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("config.json", CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (out_dir / name).write_text(json.dumps(value, indent=2) + "\n")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer = train_tokenizer()
    (out_dir / "tokenizer.json").write_text(tokenizer.to_str(pretty=False) + "\n")
    tensors = dict(make_tensors(_unwanted_ids(tokenizer)))
    (out_dir / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))


def train_tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE of `VOCAB_SIZE` tokens: the 256 bytes, then merges from the corpus, then the special tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=FIRST_SPECIAL_ID,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS_FILE.read_text().splitlines(keepends=True), trainer)
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the corpus is too short for so many merges"
    return tokenizer


def _unwanted_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Special tokens, so that output ends where a request says, and control characters, which upset terminals."""
    texts = [tokenizer.decode([token_id]) for token_id in range(VOCAB_SIZE)]
    return [token_id for token_id, text in enumerate(texts) if not text or not (text.isprintable() or text == "\n")]


def make_tensors(unwanted_ids: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its Hugging Face name: bf16 but for the gates, which the model computes in fp32.

    Args:
        unwanted_ids: tokens that are never the likeliest.
    """
    draw, hidden = _Draw(SEED), CONFIG["hidden_size"]
    yield "model.embed_tokens.weight", draw.uniform(VOCAB_SIZE, hidden, std=1.0)
    for layer in range(CONFIG["num_hidden_layers"]):
        yield from _layer(draw, f"model.layers.{layer}", dense=layer < CONFIG["first_k_dense_replace"])
    yield from _mtp_layer(draw, f"model.layers.{CONFIG['num_hidden_layers']}")
    yield "model.norm.weight", draw.norm(hidden)
    # The gain sets some tokens apart, as in a trained model: top-p, min-p and penalties have something to act on.
    head_VH = draw.linear(VOCAB_SIZE, hidden, gain=3.0)
    head_VH[unwanted_ids] = 0
    yield "lm_head.weight", head_VH


def _mtp_layer(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    hidden = CONFIG["hidden_size"]
    yield from ((f"{prefix}.{name}.weight", draw.norm(hidden)) for name in ("enorm", "hnorm", "shared_head.norm"))
    yield f"{prefix}.eh_proj.weight", draw.linear(hidden, 2 * hidden)
    yield from _layer(draw, prefix, dense=False)


def _layer(draw: _Draw, prefix: str, *, dense: bool) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}.{name}.weight", draw.norm(CONFIG["hidden_size"])
    yield from _attention(draw, f"{prefix}.self_attn")
    if dense:
        yield from _mlp(draw, f"{prefix}.mlp", CONFIG["intermediate_size"])
    else:
        yield from _moe(draw, f"{prefix}.mlp")


def _attention(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    hidden, head_dim = CONFIG["hidden_size"], CONFIG["head_dim"]
    num_heads, num_kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    for name, rows in (("q", num_heads), ("k", num_kv_heads), ("v", num_kv_heads)):
        yield f"{prefix}.{name}_proj.weight", draw.linear(rows * head_dim, hidden)
        yield f"{prefix}.{name}_proj.bias", draw.uniform(rows * head_dim, std=0.1)
    yield f"{prefix}.o_proj.weight", draw.linear(hidden, num_heads * head_dim)
    # Wide norms make attention pick single tokens, so that what is generated depends on all of the context.
    yield f"{prefix}.q_norm.weight", draw.norm(head_dim, mean=1.5)
    yield f"{prefix}.k_norm.weight", draw.norm(head_dim, mean=1.5)


def _moe(draw: _Draw, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    num_experts, hidden = CONFIG["n_routed_experts"], CONFIG["hidden_size"]
    yield f"{prefix}.gate.weight", draw.linear(num_experts, hidden, dtype=torch.float32)
    yield f"{prefix}.gate.e_score_correction_bias", draw.uniform(num_experts, std=0.05, dtype=torch.float32)
    for expert in range(num_experts):
        yield from _mlp(draw, f"{prefix}.experts.{expert}", CONFIG["moe_intermediate_size"])
    yield from _mlp(draw, f"{prefix}.shared_experts", CONFIG["moe_intermediate_size"] * CONFIG["n_shared_experts"])


def _mlp(draw: _Draw, prefix: str, intermediate: int) -> Iterator[tuple[str, torch.Tensor]]:
    hidden = CONFIG["hidden_size"]
    yield f"{prefix}.gate_proj.weight", draw.linear(intermediate, hidden)
    yield f"{prefix}.up_proj.weight", draw.linear(intermediate, hidden)
    yield f"{prefix}.down_proj.weight", draw.linear(hidden, intermediate, gain=2.0)


class _Draw:
    """Uniform random tensors in one fixed order.

    They are made from the raw bits of PCG64, which numpy keeps stable, while it may change its distributions.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def uniform(self, *shape: int, std: float, mean: float = 0.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        unit = (self._bits.random_raw(int(np.prod(shape))) >> np.uint64(11)) * 2.0**-53
        values = mean + (2 * unit - 1) * (3**0.5 * std)
        return torch.from_numpy(values).reshape(shape).to(dtype)

    def linear(
        self, rows: int, columns: int, *, gain: float = 1.0, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """A matrix whose product with a vector has gain² times the vector's variance."""
        return self.uniform(rows, columns, std=gain * columns**-0.5, dtype=dtype)

    def norm(self, size: int, mean: float = 1.0) -> torch.Tensor:
        return self.uniform(size, mean=mean, std=0.1)


def main() -> None:
    write(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_DIR)


if __name__ == "__main__":
    main()
