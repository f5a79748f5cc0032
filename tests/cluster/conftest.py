"""Real clusters on one Ray, which is started once for all tests here."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from cluster.launch import RunningCluster, launch
from octet.client import Client
from octet.config import load_config
from octet.v1 import octet_pb2 as pb

Start = Callable[..., RunningCluster]
# Transformers' classes are only partly typed.
make_config: Any = Glm4MoeConfig
make_model: Any = Glm4MoeForCausalLM


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=8,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
        object_store_memory=128 * 2**20,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Glm4Moe checkpoint without a tokenizer, drawn afresh."""
    config = make_config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=32,
        n_routed_experts=16,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        use_qk_norm=True,
        attention_bias=True,
        routed_scaling_factor=2.5,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=[1, 2],
        pad_token_id=0,
    )
    model = make_model(config).float().eval()
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.05)
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return path


@dataclasses.dataclass(frozen=True)
class Reference:
    """Greedy continuation by `transformers`."""

    model: Any

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuation: list[int] = out[0, len(prompt) :].tolist()
        return continuation


@pytest.fixture(scope="session")
def reference(checkpoint: pathlib.Path) -> Reference:
    return Reference(make_model.from_pretrained(checkpoint, dtype=torch.float32).eval())


@pytest.fixture(scope="module")
def start(ray_session: None) -> Iterator[Start]:
    """Starts clusters, each in a namespace of its own, and stops them after the module."""
    running: list[RunningCluster] = []

    def start_one(*overrides: str) -> RunningCluster:
        names = [f"ray.namespace=octet-{uuid.uuid4().hex[:8]}", "frontend.port=0", "kv.memory_gib=0.05"]
        cluster = launch(load_config(overrides=[*names, *overrides]))
        running.append(cluster)
        return cluster

    yield start_one
    for cluster in running:
        cluster.stop(drain=False)


@pytest.fixture(scope="module")
def embedded(start: Start) -> RunningCluster:
    """The embedded model on one prefill worker, one decode worker and two shards."""
    return start()


@pytest.fixture
def client(embedded: RunningCluster) -> Iterator[Client]:
    with Client(embedded.address, timeout_s=60) as client:
        yield client


def attention_members(status: pb.GetStatusResponse) -> list[pb.Member]:
    return [member for pool in status.pools if pool.name != "experts" for member in pool.members]


def at_baseline(status: pb.GetStatusResponse) -> bool:
    """No request, page or lease is held anywhere."""
    return status.live_requests == 0 and all(
        m.kv_pages_free == m.kv_pages_total and m.running == m.waiting == m.leases == 0
        for m in attention_members(status)
    )


def wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
