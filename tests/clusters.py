"""Real clusters on one Ray, which is started once for all tests here."""

from __future__ import annotations

import logging
import pathlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from cluster.launch import RunningCluster, launch
from cluster.workers.worker_start import forking
from octet.client import Client
from octet.config import load_config
from octet.v1 import octet_pb2 as pb
from tests.reference import Reference

Start = Callable[..., RunningCluster]
GRACE_S = 3.0
"""For so long the embedded model's frontend keeps a request whose client has gone."""
OBJECT_STORE_BYTES = 128 * 2**20
DECODE_PLACES = "octet_decode"
"""A resource of which every node has one, for pools that ask for it."""
# Transformers' classes are only partly typed.
make_config: Any = Glm4MoeConfig
make_model: Any = Glm4MoeForCausalLM


@pytest.fixture(scope="session")
def nodes() -> Iterator[Cluster]:
    """Ray on one node, which others may join and leave."""
    head_node = {
        "num_cpus": 8,
        "resources": {DECODE_PLACES: 1},
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        # Ray's word that a node is gone comes within seconds; see docs/cluster.md.
        "_system_config": {
            "health_check_period_ms": 500,
            "health_check_timeout_ms": 2000,
            "health_check_failure_threshold": 10,
        },
    }
    with forking():
        nodes = Cluster(initialize_head=True, head_node_args=head_node)
    ray.init(address=nodes.address, logging_level=logging.ERROR, log_to_driver=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="session")
def ray_session(nodes: Cluster) -> None:
    """A connection to Ray."""


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


@pytest.fixture(scope="session")
def reference(checkpoint: pathlib.Path) -> Reference:
    return Reference(checkpoint)


def _starter(running: list[RunningCluster]) -> Start:
    """Starts clusters, each in a namespace of its own, and notes them."""

    def start_one(*overrides: str) -> RunningCluster:
        names = [f"ray.namespace=octet-{uuid.uuid4().hex[:8]}", "frontend.port=0", "kv.memory_gib=0.05"]
        cluster = launch(load_config(overrides=[*names, *overrides]))
        running.append(cluster)
        return cluster

    return start_one


@pytest.fixture(scope="module")
def start(ray_session: None) -> Iterator[Start]:
    """Starts clusters that only one module has a use for."""
    running: list[RunningCluster] = []
    yield _starter(running)
    for cluster in running:
        cluster.stop(drain=False)


_shared: list[RunningCluster] = []


@pytest.fixture(scope="session")
def start_shared(ray_session: None) -> Iterator[Start]:
    """Starts the clusters below, which every test that does not ask for another leaves as it found them."""
    yield _starter(_shared)
    stop_shared_clusters()


def stop_shared_clusters() -> None:
    """Also before the end of the session, when nobody asks for one of them any more; see `tests/conftest.py`."""
    while _shared:
        _shared.pop().stop(drain=False)


@pytest.fixture(scope="session")
def embedded(start_shared: Start) -> RunningCluster:
    """The embedded model on one prefill worker, one decode worker and two shards."""
    return start_shared(f"frontend.resume_grace_s={GRACE_S}")


@pytest.fixture(scope="session")
def small(start_shared: Start, checkpoint: pathlib.Path) -> RunningCluster:
    """The random checkpoint on pools of one."""
    return start_shared(f"model.path={checkpoint}", "pools.experts.size=1", "prefill.chunk_tokens=96")


@pytest.fixture(scope="session")
def paired(start_shared: Start) -> RunningCluster:
    """The embedded model on two prefill workers, two decode workers and a shard, with few pages."""
    sizes = ("pools.prefill.size=2", "pools.decode.size=2", "pools.experts.size=1")
    return start_shared(*sizes, "kv.prefill_pages=300", "kv.decode_pages=300")


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


def members(status: pb.GetStatusResponse, pool: str, standby: bool = False) -> dict[str, pb.Member]:
    """The members of one pool that serve, or its processes on standby, by id."""
    return {
        member.worker_id: member
        for p in status.pools
        if p.name == pool
        for member in p.members
        if (member.state == "STANDBY") == standby
    }


def settled(client: Client, **sizes: int) -> bool:
    """Whether nothing is being changed, and pools have these sizes."""
    status = client.status()
    return (
        status.state == "READY"
        and not status.change_under_way
        and all(len(members(status, pool)) == size for pool, size in sizes.items())
    )


class Traffic:
    """Users who ask for what `transformers` has answered, over and over, each with one stream at a time."""

    def __init__(self, address: str, answers: Mapping[tuple[int, ...], Sequence[int]], num_users: int) -> None:
        """
        Args:
            answers: greedy continuations by prompt.
        """
        self._address, self._answers = address, {prompt: list(answer) for prompt, answer in answers.items()}
        self._stopping = threading.Event()
        self._failures: list[str] = []
        self._gaps: list[float] = []
        self.num_answers = 0
        self._threads = [threading.Thread(target=self._use, args=(user,), daemon=True) for user in range(num_users)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(90)
        if exc_info[0] is None:
            assert not any(thread.is_alive() for thread in self._threads), "a stream hangs"
            assert self._failures == []

    def longest_gap_s(self) -> float:
        """Between two chunks of a stream, or before the first, since the last call."""
        gaps, self._gaps = self._gaps, []
        return max(gaps, default=0.0)

    def flow(self, timeout_s: float = 60.0) -> None:
        """Wait until every user has had an answer to a question asked from now on."""
        target = self.num_answers + 2 * len(self._threads)
        wait_until(lambda: self.num_answers >= target or bool(self._failures), timeout_s, "answers go on")
        assert self._failures == []

    def _use(self, user: int) -> None:
        prompts = list(self._answers)
        draw = random.Random(user)
        with Client(self._address, timeout_s=80) as client:
            while not self._stopping.is_set():
                prompt = draw.choice(prompts)
                try:
                    self._ask(client, prompt)
                except Exception as error:
                    self._failures.append(f"{type(error).__name__}: {error}")
                    return

    def _ask(self, client: Client, prompt: tuple[int, ...]) -> None:
        expected = self._answers[prompt]
        found: list[int] = []
        last_s = time.monotonic()
        for chunk in client.stream(list(prompt), max_new_tokens=len(expected), ignore_eos=True):
            now_s = time.monotonic()
            self._gaps.append(now_s - last_s)
            last_s = now_s
            assert chunk.offset == len(found), f"a chunk at {chunk.offset} after {len(found)} tokens"
            found += chunk.token_ids
        assert found == expected, f"{found} instead of {expected}"
        self.num_answers += 1


@pytest.fixture(scope="session")
def answers(reference: Reference) -> dict[tuple[int, ...], list[int]]:
    """What `transformers` makes of some random prompts on which rounding decides nothing."""
    cases = reference.cases([random.randint(4, 60) for _ in range(6)], 48)
    return {tuple(case.prompt): case.continuation for case in cases}
