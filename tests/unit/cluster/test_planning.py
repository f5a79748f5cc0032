from __future__ import annotations

import os
import pathlib
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
