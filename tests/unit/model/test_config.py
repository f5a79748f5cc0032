from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any

import pytest
import transformers

from model.config import ModelConfig, RopeConfig, read_config, read_generation_defaults
from octet.errors import CheckpointError


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def fields_of(rng: random.Random, **changes: Any) -> dict[str, Any]:
    """A valid `config.json` of random sizes with `changes`; a change to `...` leaves the field out."""
    num_kv_heads, n_group = rng.randint(1, 4), rng.randint(1, 4)
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": rng.randint(10, 100),
        "hidden_size": rng.randint(8, 64),
        "intermediate_size": rng.randint(8, 64),
        "moe_intermediate_size": rng.randint(4, 32),
        "num_hidden_layers": rng.randint(1, 5),
        "num_attention_heads": num_kv_heads * rng.randint(1, 4),
        "num_key_value_heads": num_kv_heads,
        "head_dim": 4 * rng.randint(1, 8),
        "n_routed_experts": n_group * rng.randint(2, 8),
        "num_experts_per_tok": rng.randint(1, 2),
        "n_group": n_group,
        "topk_group": rng.randint(1, n_group),
        "rope_theta": rng.uniform(1e3, 1e6),
    } | changes
    return {name: value for name, value in fields.items() if value is not ...}


def write(model_dir: pathlib.Path, fields: object, file: str = "config.json") -> pathlib.Path:
    (model_dir / file).write_text(json.dumps(fields))
    return model_dir


def assert_names(error: CheckpointError, *parts: str) -> None:
    for part in parts:
        assert part in str(error)


def test_fields_are_read_under_their_own_names(tmp_path: pathlib.Path, rng: random.Random) -> None:
    fields = fields_of(rng, use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5, first_k_dense_replace=0)
    config = read_config(write(tmp_path, fields))
    for field in dataclasses.fields(ModelConfig):
        if field.name in fields:
            assert getattr(config, field.name) == fields[field.name], field.name


def test_what_is_left_out_defaults_as_in_transformers(tmp_path: pathlib.Path, rng: random.Random) -> None:
    required = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
    sizes: dict[str, Any] = {name: rng.randint(8, 64) for name in required}
    sizes |= {"hidden_size": 64, "num_attention_heads": 8, "n_routed_experts": 16}
    config = read_config(write(tmp_path, {"architectures": ["Glm4MoeForCausalLM"], **sizes}))
    reference = transformers.Glm4MoeConfig(**sizes)
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("rope", "eos_token_ids", "head_dim"):
            assert getattr(config, field.name) == getattr(reference, field.name), field.name
    assert config.head_dim == 8
    rope: Any = reference.rope_parameters
    assert (config.rope.theta, config.rope.partial_rotary_factor) == (rope["rope_theta"], rope["partial_rotary_factor"])


def test_a_config_written_by_transformers_is_read(tmp_path: pathlib.Path, rng: random.Random) -> None:
    fields = fields_of(rng, head_dim=16, partial_rotary_factor=0.25, eos_token_id=[1, 2])
    reference = transformers.Glm4MoeConfig(**fields)
    reference.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config == read_config(write(tmp_path, fields))
    assert config.eos_token_ids == (1, 2)


def test_layers_are_dense_then_sparse_then_mtp(tmp_path: pathlib.Path, rng: random.Random) -> None:
    fields = fields_of(rng, num_hidden_layers=5, first_k_dense_replace=2, num_nextn_predict_layers=1)
    config = read_config(write(tmp_path, fields))
    assert list(config.moe_layers) == [2, 3, 4]
    assert list(config.mtp_layers) == [5]


def test_more_dense_layers_than_layers_leave_none_sparse(tmp_path: pathlib.Path, rng: random.Random) -> None:
    config = read_config(write(tmp_path, fields_of(rng, num_hidden_layers=2, first_k_dense_replace=9)))
    assert list(config.moe_layers) == []


def test_kv_bytes_count_keys_and_values_of_every_layer(tmp_path: pathlib.Path, rng: random.Random) -> None:
    fields = fields_of(rng, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    config = read_config(write(tmp_path, fields))
    assert [config.kv_bytes_per_token(2, num_draft_layers) for num_draft_layers in (0, 1)] == [
        2 * num_layers * 2 * 8 * 2 for num_layers in (3, 4)
    ]


@pytest.mark.parametrize("rope", [{}, {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16}])
def test_flat_and_nested_rope_agree(tmp_path: pathlib.Path, rng: random.Random, rope: dict[str, Any]) -> None:
    rope_type = "yarn" if rope else "default"
    theta, partial = rng.uniform(1e3, 1e6), rng.choice([0.25, 0.5, 1.0])
    base = fields_of(rng, head_dim=16, rope_theta=...)
    flat = base | {"rope_theta": theta, "partial_rotary_factor": partial}
    if rope:
        flat["rope_scaling"] = {"type": rope_type, **rope}
    nested = base | {
        "rope_parameters": {"rope_type": rope_type, "rope_theta": theta, "partial_rotary_factor": partial, **rope}
    }
    config = read_config(write(tmp_path, flat))
    assert config == read_config(write(tmp_path, nested))
    assert (config.rope.rope_type, config.rope.theta) == (rope_type, theta)


def test_yarn_is_read_whole(tmp_path: pathlib.Path, rng: random.Random) -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 20.0,
        "beta_slow": 2.0,
        "attention_factor": 1.5,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
        "truncate": False,
    }
    rope = read_config(write(tmp_path, fields_of(rng, rope_parameters=yarn))).rope
    assert rope == RopeConfig(theta=yarn.pop("rope_theta"), **yarn)  # type: ignore[arg-type]


def test_yarn_without_a_factor_takes_the_ratio_of_context_lengths(tmp_path: pathlib.Path, rng: random.Random) -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 1024}
    fields = fields_of(rng, max_position_embeddings=4096, rope_parameters=yarn)
    rope = read_config(write(tmp_path, fields)).rope
    assert (rope.factor, rope.attention_factor, rope.truncate) == (4.0, None, True)


def test_rope_scaling_outranks_rope_parameters(tmp_path: pathlib.Path, rng: random.Random) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
    fields = fields_of(rng, rope_scaling=yarn, rope_parameters={"rope_type": "default"})
    assert read_config(write(tmp_path, fields)).rope.rope_type == "yarn"


def test_eos_ids_of_both_files_are_joined_once_each(tmp_path: pathlib.Path, rng: random.Random) -> None:
    write(tmp_path, {"eos_token_id": [7, 5]}, "generation_config.json")
    assert read_config(write(tmp_path, fields_of(rng, eos_token_id=5))).eos_token_ids == (5, 7)


def test_eos_ids_that_no_token_can_have_are_left_out(tmp_path: pathlib.Path, rng: random.Random) -> None:
    """A small model's directory often has the `generation_config.json` of a large one."""
    write(tmp_path, {"eos_token_id": [151329, 50, 3]}, "generation_config.json")
    assert read_config(write(tmp_path, fields_of(rng, vocab_size=50, eos_token_id=49))).eos_token_ids == (49, 3)


@pytest.mark.parametrize(
    ("changes", "field", "found", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "architectures", "LlamaForCausalLM", "Glm4MoeForCausalLM"),
        ({"architectures": ...}, "architectures", "None", "Glm4MoeForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act", "gelu", "silu"),
        ({"quantization_config": {"bits": 8}}, "quantization_config", "bits", "none"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_scaling.rope_type", "llama3", "yarn"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type", "linear", "yarn"),
        ({"rope_parameters": "yarn"}, "rope_parameters", "yarn", "a mapping"),
        ({"rope_parameters": {"rope_theta": "big"}}, "rope_parameters.rope_theta", "big", "a number > 1"),
        ({"rope_theta": 0}, "rope_theta", "0", "> 1"),
        ({"rope_theta": 1e-300}, "rope_theta", "1e-300", "> 1"),
        ({"rope_scaling": {"type": "yarn", "rope_theta": 1}}, "rope_scaling.rope_theta", "1", "> 1"),
        ({"rope_scaling": {"type": "yarn", "factor": -1.0}}, "rope_scaling.factor", "-1.0", "[1e-06, 1e+06]"),
        ({"rope_scaling": {"type": "yarn", "beta_fast": 0}}, "rope_scaling.beta_fast", "0", "[1e-06, 1e+06]"),
        ({"rope_scaling": {"type": "yarn", "beta_slow": 1e308}}, "rope_scaling.beta_slow", "1e+308", "[1e-06, 1e+06]"),
        ({"rope_scaling": {"type": "yarn", "truncate": 1}}, "rope_scaling.truncate", "1", "true or false"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor", "1.5", "(0, 1]"),
        ({"head_dim": 6, "partial_rotary_factor": 0.5}, "head_dim", "6", "even"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "num_key_value_heads", "4", "divisor of 6"),
        ({"n_routed_experts": 10, "n_group": 4, "topk_group": 4}, "n_routed_experts", "10", "multiple of n_group (4)"),
        ({"n_routed_experts": 4, "n_group": 4}, "n_group", "4", "two experts per group"),
        ({"n_routed_experts": 8, "n_group": 2, "topk_group": 3}, "topk_group", "3", "at most n_group (2)"),
        (
            {"n_routed_experts": 8, "n_group": 2, "topk_group": 2, "num_experts_per_tok": 9},
            "num_experts_per_tok",
            "9",
            "at most the 8",
        ),
        (
            {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 5},
            "num_experts_per_tok",
            "5",
            "at most the 4",
        ),
        ({"hidden_size": "64"}, "hidden_size", "'64'", "an integer ≥ 1"),
        ({"hidden_size": 64.0}, "hidden_size", "64.0", "an integer ≥ 1"),
        ({"vocab_size": 0}, "vocab_size", "0", "an integer ≥ 1"),
        ({"vocab_size": True}, "vocab_size", "True", "an integer ≥ 1"),
        ({"vocab_size": ...}, "vocab_size", "nothing", "a value"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace", "-1", "an integer ≥ 0"),
        ({"routed_scaling_factor": [1]}, "routed_scaling_factor", "[1]", "a finite number"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor", "nan", "a finite number"),
        ({"routed_scaling_factor": 10**400}, "routed_scaling_factor", "1000", "a finite number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps", "0.0", "> 0"),
        ({"use_qk_norm": "yes"}, "use_qk_norm", "'yes'", "true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id", "</s>", "a token id"),
        ({"eos_token_id": [1, None]}, "eos_token_id", "None", "a token id"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    tmp_path: pathlib.Path, rng: random.Random, changes: dict[str, Any], field: str, found: str, expected: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        read_config(write(tmp_path, fields_of(rng, **changes)))
    assert_names(raised.value, f"config.json: '{field}': found ", found, "expected ", expected)
    assert (raised.value.file, raised.value.subject) == ("config.json", field)


@pytest.mark.parametrize(
    ("content", "found"), [(None, "No such file"), (b"{", "invalid JSON"), (b"\xff", "invalid JSON"), (b"[]", "list")]
)
def test_an_unreadable_config_is_refused(tmp_path: pathlib.Path, content: bytes | None, found: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_config(tmp_path)
    assert_names(raised.value, "config.json: found ", found, "expected a")


def test_without_a_generation_config_decoding_is_greedy(tmp_path: pathlib.Path) -> None:
    assert read_generation_defaults(tmp_path).temperature == 0.0


def test_generation_defaults_sample_only_if_asked_to(tmp_path: pathlib.Path) -> None:
    fields = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "max_new_tokens": 9}
    assert read_generation_defaults(write(tmp_path, fields, "generation_config.json")).temperature == 0.0
    write(tmp_path, fields | {"do_sample": True, "repetition_penalty": 1.1}, "generation_config.json")
    defaults = read_generation_defaults(tmp_path)
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (0.6, 0.9, 20, 0.1)
    assert (defaults.repetition_penalty, defaults.max_new_tokens) == (1.1, 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"do_sample": 1},
        {"top_k": 1.5},
        {"top_p": "all"},
        {"top_p": 0.0},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 1e-40},
        {"max_new_tokens": 0},
    ],
)
def test_a_wrong_generation_default_is_refused(tmp_path: pathlib.Path, changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(CheckpointError) as raised:
        read_generation_defaults(write(tmp_path, changes, "generation_config.json"))
    assert_names(raised.value, f"generation_config.json: '{field}': found {changes[field]!r}")


def test_a_default_temperature_that_no_request_may_ask_for_is_refused(tmp_path: pathlib.Path) -> None:
    write(tmp_path, {"do_sample": True, "temperature": 150}, "generation_config.json")
    with pytest.raises(CheckpointError, match=r"'temperature': found 150, expected a number in \[0, 100\]"):
        read_generation_defaults(tmp_path)
