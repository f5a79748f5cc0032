from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from experts.shard import ExpertShard
from experts.slots import ExpertSlots
from model.census import required_tensors
from model.checkpoint import Checkpoint
from model.weights import GateWeights
from octet.errors import ExpertMissingError
from router.exchange import LocalExchange
from router.gate import select_experts
from router.placement import EMPTY, Placement, from_physical, place_evenly
from router.routed_experts import RoutedExperts

NUM_EXPERTS, HIDDEN_SIZE, NUM_TOKENS = 8, 24, 50
CPU = torch.device("cpu")
LAYERS = (1, 2)


@pytest.fixture(autouse=True)
def fresh_seed() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> Checkpoint:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 8,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config_tensors = required_tensors(Checkpoint.open.__func__ and _config(tmp_path))
    save_file({name: torch.randn(shape) * 0.3 for name, shape in config_tensors.items()}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.fixture
def gates() -> dict[int, GateWeights]:
    return {
        layer: GateWeights(weight=torch.randn(NUM_EXPERTS, HIDDEN_SIZE), correction_bias=torch.randn(NUM_EXPERTS))
        for layer in LAYERS
    }
