from __future__ import annotations

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
