"""A small model, round costs, and traces for the tests of the simulator."""

from __future__ import annotations

import dataclasses
import random

import numpy as np

from octet.config import OctetConfig
from ops.simulate.costs import Costs
from ops.simulate.expert_loads import ExpertLoads, drawn
from ops.simulate.load import Request
from ops.simulate.outcome import Run
from ops.simulate.shape import Shape
from ops.simulate.simulation import Options, Simulation

SHAPE = Shape(
    num_layers=3,
    moe_layers=range(1, 3),
    num_experts=8,
    experts_per_token=2,
    hidden_bytes=64,
    worker_bytes=1000,
    worker_read_bytes=1000,
    worker_flops=1.0,
    attention_flops=1.0,
    kv_bytes=100,
    expert_bytes=100,
    expert_flops=1.0,
)
NOTHING = Costs(
    **{field.name: 0 for field in dataclasses.fields(Costs) if field.name != "reads_overlap"}, reads_overlap=True
)
"""Everything is free: tests name what is not."""


def costs(**seconds: float) -> Costs:
    return dataclasses.replace(NOTHING, **seconds)  # type: ignore[arg-type]


def loads(drift: float = 0.0, every_s: float = 60.0, duration_s: float = 0.0) -> ExpertLoads:
    rng = np.random.default_rng(1)
    return drawn(2, 8, 2, rng, (1.0, 1.0), drift=drift, drift_every_s=every_s, duration_s=duration_s)


def config(**sections: object) -> OctetConfig:
    prompt: dict[str, object] = {
        "kv": {"page_size": 16},
        "frontend": {"max_requests": 100_000, "max_queued_tokens": 10**9, "default_timeout_s": 1e6},
        "lane": {"ping_pong_rows": None},
    }
    return OctetConfig.model_validate(prompt | sections)


def request(at_s: float, prompt: int = 64, new: int = 8, blocks: tuple[int, ...] = ()) -> Request:
    return Request(at_s=at_s, prompt_tokens=prompt, new_tokens=new, blocks=blocks)


def poisson(rate: float, count: int, seed: int, prompt: int = 64, new: int = 8) -> list[Request]:
    rng, at_s, requests = random.Random(seed), 0.0, []
    for _ in range(count):
        at_s += rng.expovariate(rate)
        requests.append(request(at_s, prompt, new))
    return requests


def options(prefill: int = 1, decode: int = 1, experts: int = 2, **more: object) -> Options:
    given: dict[str, object] = {
        "redundant": 0,
        "slots_that_fit": 8,
        "prefill_pages": 10_000,
        "decode_pages": 10_000,
        "autoscale": False,
        "balance": True,
        "gpu": True,
        "seed": 0,
    }
    sizes = {"prefill": prefill, "decode": decode, "experts": experts}
    return Options(sizes=sizes, **{**given, **more})  # type: ignore[arg-type]


def run(requests: list[Request], cost: Costs, conf: OctetConfig | None = None, opts: Options | None = None) -> Run:
    return Simulation(requests, loads(), SHAPE, cost, conf or config(), opts or options()).run()
