"""The same closed loop on a cluster that is simulated."""

from __future__ import annotations

import numpy as np

from octet.config import OctetConfig
from ops.bench.simulator.measured import Loop
from ops.bench.simulator.report import Figures, Sizes
from ops.simulate.costs import Costs
from ops.simulate.expert_loads import drawn
from ops.simulate.load import Request
from ops.simulate.outcome import summarized
from ops.simulate.shape import Shape
from ops.simulate.simulation import Options, Simulation

_ALPHA = (0.0, 0.1)
"""A random checkpoint on random prompts routes almost evenly."""
_TICK_S = 0.02
_PAGES = 10**6
"""No loop of a bench is short of them."""


def simulated(config: OctetConfig, sizes: Sizes, shape: Shape, costs: Costs, loop: Loop) -> Figures:
    loads = drawn(len(shape.moe_layers), shape.num_experts, shape.experts_per_token, np.random.default_rng(0), _ALPHA)
    one = Request(at_s=0.0, prompt_tokens=loop.prompt_tokens, new_tokens=loop.new_tokens, blocks=())
    run = Simulation(
        [one] * loop.requests,
        loads,
        shape,
        costs,
        config,
        Options(
            sizes=dict(zip(("prefill", "decode", "experts"), sizes, strict=True)),
            redundant=0,
            slots_that_fit=shape.num_experts,
            prefill_pages=_PAGES,
            decode_pages=_PAGES,
            autoscale=False,
            balance=False,
            gpu=False,
            seed=0,
            tick_s=_TICK_S,
            streams=loop.streams,
        ),
    ).run()
    result = summarized(run, 0.0)
    return Figures(tokens_per_s=result.tokens_per_s, ttft_s=result.ttft_s.p50, tpot_s=result.tpot_s.p50)
