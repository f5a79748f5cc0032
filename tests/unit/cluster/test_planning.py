from __future__ import annotations

import math
import os
import pathlib
import random
import shutil

import pytest
import safetensors.torch

from cluster.planning import EMBEDDED_MODEL, make_plan
from octet.config import load_config
from octet.errors import ConfigError

DRAFTS = "speculation.num_speculative_tokens=2"


def test_speculation_adds_the_mtp_layers_experts_and_kv() -> None:
    without, speculating = make_plan(load_config()), make_plan(load_config(None, [DRAFTS]))
    layer = without.model.num_hidden_layers
    assert speculating.routing.placement.layers == (*without.routing.placement.layers, layer)
    assert speculating.census.kv_bytes_per_token * layer == without.census.kv_bytes_per_token * (layer + 1)


def test_speculation_without_an_mtp_layer_is_refused(tmp_path: pathlib.Path) -> None:
    shutil.copytree(EMBEDDED_MODEL, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({n: t for n, t in tensors.items() if ".layers.4." not in n}, file, {"format": "pt"})
    model = f"model.path={tmp_path}"
    make_plan(load_config(None, [model]))
    with pytest.raises(ConfigError, match=r"'speculation\.num_speculative_tokens': found 2, expected 0"):
        make_plan(load_config(None, [model, DRAFTS]))


def test_a_name_on_a_hub_is_told_what_to_do_and_other_paths_are_not() -> None:
    with pytest.raises(ConfigError, match=r"hf download zai-org/GLM-4\.6 --local-dir"):
        make_plan(load_config(None, ["model.path=zai-org/GLM-4.6"]))
    with pytest.raises(ConfigError, match=r"expected a Hugging Face model directory$"):
        make_plan(load_config(None, ["model.path=/no/such/model"]))


def test_pools_share_the_cores_and_decode_workers_take_turns_with_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    assert make_plan(load_config()).threads == {"prefill": 12, "decode": 12, "experts": 3}
    two = ["pools.decode.size=2", "pools.prefill.num_cpus=4", "pools.experts.threads=5"]
    assert make_plan(load_config(None, two)).threads == {"prefill": 4, "decode": 6, "experts": 5}


def test_pages_are_no_more_than_the_sequences_of_a_pool_can_use() -> None:
    plan = make_plan(load_config(None, ["prefill.max_requests=3", "decode.max_batch=5", "kv.page_size=24"]))
    of_one = math.ceil(plan.model.max_position_embeddings / 24)
    assert (plan.prefill_pages, plan.decode_pages) == (3 * of_one, 5 * of_one)
    assert plan.max_model_len == plan.model.max_position_embeddings


def test_pages_are_no_more_than_fit_the_memory_and_the_context_no_more_than_they_hold() -> None:
    page_bytes = make_plan(load_config()).census.kv_bytes_per_token * 16
    pages = random.randint(1, 40)
    plan = make_plan(load_config(None, [f"kv.memory_gib={(pages + 0.5) * page_bytes / 2**30}"]))
    assert (plan.prefill_pages, plan.decode_pages) == (pages, pages)
    assert plan.max_model_len == min(pages * 16, plan.model.max_position_embeddings)


@pytest.mark.parametrize("smaller", ["prefill", "decode"])
def test_the_context_is_what_the_smaller_pool_holds(smaller: str) -> None:
    pages = {"prefill": 50, "decode": 50} | {smaller: 7}
    flags = [f"kv.{pool}_pages={count}" for pool, count in pages.items()]
    assert make_plan(load_config(None, flags)).max_model_len == 7 * 16
    assert make_plan(load_config(None, [*flags, "model.max_model_len=112"])).max_model_len == 112
    with pytest.raises(ConfigError, match=r"'model\.max_model_len': found 113, expected at most the 112 tokens"):
        make_plan(load_config(None, [*flags, "model.max_model_len=113"]))


def test_a_context_beyond_the_models_is_refused() -> None:
    most = make_plan(load_config()).model.max_position_embeddings
    assert make_plan(load_config(None, [f"model.max_model_len={most}"])).max_model_len == most
    with pytest.raises(ConfigError, match=rf"'model\.max_model_len': found {most + 1}, expected at most the model's"):
        make_plan(load_config(None, [f"model.max_model_len={most + 1}"]))


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["kv.memory_gib=1e-9"], r"kv\.memory_gib"),
        (["pools.experts.num_gpus=1"], r"pools\.decode\.num_gpus"),
        (["pools.experts.size=33"], r"pools\.experts\.size"),
        (["pools.experts.slots_per_shard=15"], r"pools\.experts\.slots_per_shard"),
        (["pools.experts.slots_per_shard=17", "pools.experts.redundant_experts=4"], r"pools\.experts\.slots_per_shard"),
    ],
)
def test_what_cannot_be_served_names_its_field(flags: list[str], field: str) -> None:
    assert make_plan(load_config()).model.n_routed_experts == 32, "on two shards"
    with pytest.raises(ConfigError, match=field):
        make_plan(load_config(None, flags))


def test_slots_that_are_filled_at_the_start_are_enough() -> None:
    plan = make_plan(load_config(None, ["pools.experts.slots_per_shard=18", "pools.experts.redundant_experts=4"]))
    assert plan.routing.placement.slots_per_shard == 18
