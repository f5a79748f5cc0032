"""Cosines and sines against those of `transformers`."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRotaryEmbedding

from model.config import read_config
from model.rotary import RotaryEmbedding
from tests.unit.model.subject import CPU

pytestmark = pytest.mark.usefixtures("fresh_seed")

NUM_POSITIONS = 300
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 6.25, "original_max_position_embeddings": 600}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "yarn": YARN,
    "attention_factor": {**YARN, "attention_factor": 0.6},
    "mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
    "mscale_alone": {**YARN, "mscale": 0.7},
    "shrunk": {**YARN, "factor": 0.5},
    "not_truncated": {**YARN, "truncate": False},
    "ramp_from_before_the_first_dim": {**YARN, "original_max_position_embeddings": 100},
    "ramp_beyond_the_last_dim": {**YARN, "original_max_position_embeddings": 10**9, "beta_fast": 1e6},
    "no_ramp": {**YARN, "beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
}


@pytest.mark.parametrize("name", ROPES)
def test_positions_are_rotated_as_by_transformers(tmp_path: pathlib.Path, name: str) -> None:
    rope = {**ROPES[name], "rope_theta": 10000.0, "partial_rotary_factor": random.choice((0.5, 1.0))}
    head_dim = 4 * random.randint(8, 32)
    fields: dict[str, Any] = {"architectures": ["Glm4MoeForCausalLM"], "head_dim": head_dim, "rope_parameters": rope}
    config = Glm4MoeConfig(**fields)
    config.save_pretrained(tmp_path)
    positions = torch.arange(NUM_POSITIONS)
    rotary = RotaryEmbedding(read_config(tmp_path), NUM_POSITIONS, CPU)
    reference: Any = Glm4MoeRotaryEmbedding(config)
    expected = [part[0] for part in reference(torch.empty(1), positions[None])]
    torch.testing.assert_close(list(rotary.at(positions, torch.float32)), expected, rtol=1e-4, atol=1e-4)
