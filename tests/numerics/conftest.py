"""Small random checkpoints in the format of `transformers`."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from tests.reference import Reference

CONFIG: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "max_position_embeddings": 512,
    # Large enough that layers, not the embedding, decide the next token.
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

MakeReference = Callable[..., Reference]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: on a busy machine, waiting for a second thread takes ten times as long as the work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def drawn_afresh(fresh_seed: None) -> None:
    """Inputs of every test here."""


@pytest.fixture(scope="session")
def make_reference(tmp_path_factory: pytest.TempPathFactory) -> MakeReference:
    """Makes a random checkpoint, once for each name.

    Args of what it returns: a name; `dtype` and `max_shard_size` of the files; `rewrite`, which may edit the
    directory; and fields of `config.json` to be set.
    """
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    made: dict[str, Reference] = {}

    def make(
        name: str,
        *,
        dtype: torch.dtype = torch.float32,
        max_shard_size: str = "1GB",
        rewrite: Callable[[pathlib.Path], None] | None = None,
        **fields: Any,
    ) -> Reference:
        if name not in made:
            model_dir = tmp_path_factory.mktemp("checkpoint")
            model: Any = Glm4MoeForCausalLM(Glm4MoeConfig(**{**CONFIG, **fields}))
            randomise(model)
            model.to(dtype).save_pretrained(model_dir, max_shard_size=max_shard_size)
            if rewrite is not None:
                rewrite(model_dir)
            made[name] = Reference(model_dir)
        return made[name]

    return make


@torch.no_grad()
def randomise(model: Any) -> None:
    """What `transformers` starts at one or at zero, so that leaving it out changes the logits."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("norm.weight"):
            tensor.normal_(1, 0.1)
        elif name.endswith("bias"):
            tensor.normal_(0, 0.05)
