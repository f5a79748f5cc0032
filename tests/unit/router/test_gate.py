from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from model.config import ModelConfig, read_config
from model.linear import Packer, linear
from model.weights import GateWeights
from router.gate import Gate, _choose

pytestmark = pytest.mark.usefixtures("fresh_seed")

HIDDEN_SIZE = 24
NUM_TOKENS = 200

GATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "all_experts": {"num_experts_per_tok": 16},
    "one_expert": {"num_experts_per_tok": 1},
    "groups": {"n_group": 4, "topk_group": 2},
    "three_of_four_groups": {"n_group": 4, "topk_group": 3},
    "one_group_of_eight": {"n_group": 8, "topk_group": 1, "num_experts_per_tok": 2},
    "all_groups": {"n_group": 4, "topk_group": 4},
    "unnormalised": {"norm_topk_prob": False},
    "scaled": {"routed_scaling_factor": 2.5},
    "glm_4_6": {"n_routed_experts": 160, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5},
}


def config_of(model_dir: pathlib.Path, **changes: Any) -> ModelConfig:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    }
    (model_dir / "config.json").write_text(json.dumps({**fields, **changes}))
    return read_config(model_dir)


def random_gate(config: ModelConfig) -> GateWeights:
    weight = torch.randn(config.n_routed_experts, HIDDEN_SIZE) * 0.3
    return GateWeights(weight=weight, correction_bias=torch.randn(config.n_routed_experts) * 0.2)


def by_expert(expert_ids_TK: torch.Tensor, weights_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Weights `[T, E]`, NaN where an expert was not chosen."""
    return torch.full((len(weights_TK), num_experts), torch.nan).scatter(1, expert_ids_TK, weights_TK)


@pytest.mark.parametrize("name", GATES)
def test_experts_and_weights_are_those_of_transformers(name: str, tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, **GATES[name])
    gate, x_TH = random_gate(config), torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    reference: Any = Glm4MoeTopkRouter(Glm4MoeConfig.from_pretrained(tmp_path))
    reference.load_state_dict({"weight": gate.weight, "e_score_correction_bias": gate.correction_bias})
    with torch.inference_mode():
        _, weights_TK, expert_ids_TK = reference(x_TH)
    found = by_expert(*Gate(gate, config).select(x_TH), config.n_routed_experts)
    expected = by_expert(expert_ids_TK, weights_TK, config.n_routed_experts)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("score", [-300.0, -90.0, 90.0, 300.0])
def test_scores_at_the_ends_of_the_sigmoid_weigh_what_transformers_says(score: float, tmp_path: pathlib.Path) -> None:
    """At the lower one all weights are 0, of which none can be made 1 by dividing by their sum."""
    config = config_of(tmp_path)
    weight, x_TH = torch.full((config.n_routed_experts, HIDDEN_SIZE), score / HIDDEN_SIZE), torch.ones(3, HIDDEN_SIZE)
    gate = GateWeights(weight=weight, correction_bias=torch.randn(config.n_routed_experts))
    reference: Any = Glm4MoeTopkRouter(Glm4MoeConfig.from_pretrained(tmp_path))
    reference.load_state_dict({"weight": gate.weight, "e_score_correction_bias": gate.correction_bias})
    with torch.inference_mode():
        _, expected_TK, expert_ids_TK = reference(x_TH)
    found_ids_TK, found_TK = Gate(gate, config).select(x_TH)
    assert found_ids_TK.sort().values.equal(expert_ids_TK.sort().values)
    torch.testing.assert_close(found_TK, expected_TK)


def test_the_correction_bias_chooses_but_does_not_weigh(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, num_experts_per_tok=2, norm_topk_prob=False)
    gate = random_gate(config)
    gate.correction_bias.zero_()[[3, 11]] = 10.0
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    expert_ids_TK, weights_TK = Gate(gate, config).select(x_TH)
    assert {tuple(sorted(row)) for row in expert_ids_TK.tolist()} == {(3, 11)}
    torch.testing.assert_close(weights_TK, linear(x_TH, gate.weight).sigmoid().gather(1, expert_ids_TK))


def test_the_gate_of_a_bf16_model_computes_in_fp32(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path)
    gate, x_TH = random_gate(config), torch.randn(NUM_TOKENS, HIDDEN_SIZE).bfloat16()
    found, expected = Gate(gate, config).select(x_TH), Gate(gate, config).select(x_TH.float())
    assert found[1].dtype == torch.float32
    assert found[0].equal(expected[0])
    assert found[1].equal(expected[1])


def test_normalised_weights_sum_to_the_scaling_factor(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, routed_scaling_factor=2.5)
    _, weights_TK = Gate(random_gate(config), config).select(torch.randn(NUM_TOKENS, HIDDEN_SIZE))
    torch.testing.assert_close(weights_TK.sum(-1), torch.full((NUM_TOKENS,), 2.5))


@pytest.mark.parametrize("name", GATES)
def test_few_tokens_choose_as_they_do_among_many(name: str, tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, **GATES[name])
    packer = Packer()
    weight, rows_EH = packer.matrix(config.n_routed_experts, HIDDEN_SIZE)
    rows_EH.normal_(std=0.3)
    packer.pack()
    gate = Gate(GateWeights(weight=weight, correction_bias=torch.randn(config.n_routed_experts) * 0.2), config)
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    many, few = gate.select(x_TH), [gate.select(part_TH) for part_TH in x_TH.split(9)]
    assert torch.cat([ids_TK for ids_TK, _ in few]).equal(many[0])
    assert torch.cat([weights_TK for _, weights_TK in few]).equal(many[1])


@pytest.mark.parametrize("name", GATES)
def test_the_torch_operators_that_gpus_use_choose_alike(name: str, tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, **GATES[name])
    gate, x_TH = random_gate(config), torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    ours = by_expert(*Gate(gate, config).select(x_TH), config.n_routed_experts)
    theirs = by_expert(*_choose(linear(x_TH, gate.weight), gate.correction_bias, config), config.n_routed_experts)
    torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_of_equal_experts_those_with_the_lowest_numbers_are_chosen(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path, n_group=4, topk_group=2)
    gate = GateWeights(weight=torch.zeros(16, HIDDEN_SIZE), correction_bias=torch.zeros(16))
    expert_ids_TK, _ = Gate(gate, config).select(torch.randn(NUM_TOKENS, HIDDEN_SIZE))
    assert expert_ids_TK.equal(torch.arange(4).expand(NUM_TOKENS, 4))


def test_a_row_of_nan_still_chooses_different_experts(tmp_path: pathlib.Path) -> None:
    config = config_of(tmp_path)
    expert_ids_TK, _ = Gate(random_gate(config), config).select(torch.full((1, HIDDEN_SIZE), torch.nan))
    assert len(set(expert_ids_TK[0].tolist())) == 4
