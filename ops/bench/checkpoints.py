"""Random checkpoints of any shape, for benchmarks that must not depend on a download."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from model.census import mtp_tensors, required_tensors
from model.config import ARCHITECTURE, CONFIG_FILE, read_config
from octet.errors import ConfigError

BENCH: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "glm4_moe",
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 256,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "num_nextn_predict_layers": 0,
    "eos_token_id": [1, 2, 3],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}
"""111 M parameters, 7 of 8 layers with 32 experts, top-8."""


def write_checkpoint(model_dir: pathlib.Path, fields: dict[str, Any], seed: int = 0) -> None:
    """A random fp32 checkpoint of these `config.json` fields, with the MTP layers that they announce.

    Raises: ConfigError where it cannot be written.
    """
    try:
        _write(model_dir, fields, seed)
    except (OSError, SafetensorError) as error:
        found = f"{model_dir} ({error})"
        raise ConfigError("MODEL_DIR", found, "a directory that can be made or written to, with room") from error


def _write(model_dir: pathlib.Path, fields: dict[str, Any], seed: int) -> None:
    model_dir.mkdir(parents=True, exist_ok=True)
    (model_dir / CONFIG_FILE).write_text(json.dumps(fields, indent=2))
    generator, config = np.random.default_rng(seed), read_config(model_dir)
    tensors = {
        name: generator.standard_normal(shape, dtype=np.float32) * np.float32(0.05) + np.float32("norm" in name)
        for name, shape in (required_tensors(config) | mtp_tensors(config)).items()
    }
    save_file(tensors, model_dir / "model.safetensors")
