"""What takes part in a comparison: something that takes prompts and says how long it took."""

from __future__ import annotations

import abc
import asyncio
import dataclasses
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from cluster.launch import RunningCluster, launch
from octet.client import AsyncClient
from octet.config import load_config
from ops.bench.peers.environments import TRANSFORMERS, VLLM, Environment, PeerError, build
from ops.bench.peers.lines import LinePeer

_ENGINES = pathlib.Path(__file__).with_name("engines.py")
_START_S, _ANSWER_S = 600.0, 900.0
_PAGE_SIZE = 16


class Contestant(Protocol):
    """One system, loaded and ready."""

    name: str
    version: str

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds from the submission of all prompts at once to the last token of the last one.

        Raises: OctetError if a prompt did not get its tokens.
        """

    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What every contestant is made for."""

    checkpoint: pathlib.Path
    threads: int
    """Of the contestants of one process. A cluster has as many cores for all of its own."""
    max_sequences: int
    max_len: int
    sampling: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Some of `temperature`, `top_p`, `top_k`; none for greedy."""

    @property
    def num_pages(self) -> int:
        return self.max_sequences * -(-self.max_len // _PAGE_SIZE)

    @property
    def arguments(self) -> list[str]:
        """Of an engine's command line."""
        numbers = str(self.threads), str(self.max_sequences), str(self.max_len)
        return [str(self.checkpoint), *numbers, json.dumps(dict(self.sampling))]


class _Served(abc.ABC):
    """A cluster that is asked over gRPC, in one way or the other."""

    name: str

    def __init__(self, address: str, version: str, sampling: Mapping[str, float]) -> None:
        self.address, self.version, self.sampling = address, version, sampling

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        return asyncio.run(self._run(prompts, new_tokens))

    async def _run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        options = {"temperature": 0.0, **self.sampling, "max_new_tokens": new_tokens, "ignore_eos": True}
        async with AsyncClient(self.address, timeout_s=_ANSWER_S) as client:
            # The connection is made before the clock starts.
            await client.model_info()
            start_s = time.perf_counter()
            tokens = await asyncio.gather(*(self._ask(client, prompt, options) for prompt in prompts))
            seconds = time.perf_counter() - start_s
        if tokens != [new_tokens] * len(prompts):
            raise PeerError(self.name, f"gave {tokens} tokens, expected {new_tokens} for each prompt")
        return seconds

    @abc.abstractmethod
    async def _ask(self, client: AsyncClient, prompt: Sequence[int], options: dict[str, Any]) -> int:
        """How many tokens the answer has, once it is complete."""

    def close(self) -> None:
        return


class ClusterContestant(_Served):
    """This project as it is served, which streams every token: a cluster of its own (a prefill worker, a decode worker,
    two shards), or one that runs already."""

    name = "octet"

    def __init__(self, size: Size, overrides: Sequence[str], address: str | None = None) -> None:
        """
        Args:
            overrides: of the config of a cluster of its own.
            address: of one that runs, `host:port` of its gRPC API.
        """
        self._cluster: RunningCluster | None = None
        if address is not None:
            super().__init__(address, f"at {address}", size.sampling)
            return
        self._cluster = launch_cluster(size, overrides)
        pools, threads = self._cluster.plan.config.pools, self._cluster.plan.threads
        changed = f", {' '.join(overrides)}" if overrides else ""
        super().__init__(
            self._cluster.address,
            f"{pools.prefill.size} prefill + {pools.decode.size} decode + {pools.experts.size} shards, "
            f"threads {'/'.join(str(count) for count in threads.values())}{changed}",
            size.sampling,
        )

    async def _ask(self, client: AsyncClient, prompt: Sequence[int], options: dict[str, Any]) -> int:
        return sum([len(chunk.token_ids) async for chunk in client.stream(prompt, **options)])

    def close(self) -> None:
        if self._cluster is not None:
            self._cluster.stop(drain=False)


class WholeAnswers(_Served):
    """The same cluster, asked for whole answers, as its peers are: none of them streams a token."""

    name = "octet-whole"

    def __init__(self, cluster: ClusterContestant) -> None:
        super().__init__(cluster.address, "the same cluster, whole answers instead of streams", cluster.sampling)

    async def _ask(self, client: AsyncClient, prompt: Sequence[int], options: dict[str, Any]) -> int:
        # Backwards: the cluster may know the prompts from its turn with streams, and would find them in its cache.
        return len((await client.generate(prompt[::-1], **options)).choices[0].token_ids)


def launch_cluster(size: Size, overrides: Sequence[str]) -> RunningCluster:
    """A cluster of its own, of one prefill and one decode worker and two shards, changed by `overrides`."""
    fields = {
        "model.max_model_len": size.max_len,
        "pools.experts.size": 2,
        "kv.page_size": _PAGE_SIZE,
        "kv.prefill_pages": size.num_pages,
        "kv.decode_pages": size.num_pages,
        "decode.max_batch": size.max_sequences,
        "ray.namespace": f"octet-{uuid.uuid4().hex[:8]}",
        "frontend.port": 0,
    }
    # Ray would run its workers at niceness 15, and whatever the others leave running between their turns before them.
    os.environ.setdefault("RAY_worker_niceness", "0")
    own = [f"{name}={value}" for name, value in fields.items()]
    return launch(load_config(overrides=[*own, *overrides], values={"model.path": str(size.checkpoint)}))


def start_engine(engine: str, environment: Environment, size: Size, env_dir: pathlib.Path) -> LinePeer:
    """One of `ops.bench.peers.engines`, in its own environment. Raises: PeerError."""
    python = build(environment, env_dir)
    # Isolated: neither this project's packages nor the user's are the peer's.
    command = [str(python), "-I", str(_ENGINES), engine, *size.arguments]
    return LinePeer(engine, command, {}, start_s=_START_S, answer_s=_ANSWER_S)


def _start_local(size: Size, env_dir: pathlib.Path) -> LinePeer:
    root = str(pathlib.Path(__file__).resolve().parents[3])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "ops.bench.peers.local_engine", *size.arguments]
    return LinePeer("local", command, {"PYTHONPATH": path}, start_s=_START_S, answer_s=_ANSWER_S)


PEERS: dict[str, Callable[[Size, pathlib.Path], Contestant]] = {
    "local": _start_local,
    "transformers": lambda size, env_dir: start_engine("transformers", TRANSFORMERS, size, env_dir),
    "vllm": lambda size, env_dir: start_engine("vllm", VLLM, size, env_dir),
    "vllm-eager": lambda size, env_dir: start_engine("vllm-eager", VLLM, size, env_dir),
}
"""By name; Octet's cluster takes part, in both ways, whichever of them do."""
