"""What a breakdown may ask for, before any process of it starts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from cluster.plan import ServingPlan
from cluster.planning import EMBEDDED_MODEL, make_plan
from octet.config import load_config
from octet.errors import ConfigError
from ops.bench.breakdown.calibration import BreakdownOptions, check, values
from ops.bench.breakdown.command import bench_breakdown
from ops.bench.machine import memory_bytes


def planned(options: BreakdownOptions) -> ServingPlan:
    return make_plan(load_config(values=values(str(EMBEDDED_MODEL), options)))


def test_pages_hold_every_sequence_of_a_load_that_is_allowed() -> None:
    options = BreakdownOptions(
        streams=tuple(random.sample(range(1, 40), 3)), prompt_tokens=random.randint(1, 900), new_tokens=4
    )
    plan = planned(options)
    check(plan, options)
    assert plan.max_model_len >= options.longest
    assert min(plan.prefill_pages, plan.decode_pages) * plan.config.kv.page_size >= options.sequences * options.longest


@pytest.mark.parametrize("name", ["prompt_tokens", "long_prompt_tokens"])
def test_more_than_the_context_is_refused(name: str) -> None:
    # A hand-off has eight tokens after it, though four are asked for.
    context = planned(BreakdownOptions()).model.max_position_embeddings

    def asking(num_tokens: int) -> BreakdownOptions:
        fields: dict[str, Any] = {name: num_tokens}
        return BreakdownOptions(streams=(1,), new_tokens=4, **fields)

    fits, more = asking(context - 8), asking(context - 7)
    check(planned(fits), fits)
    with pytest.raises(ConfigError, match=rf"{context + 1} tokens.*at most the model's {context}"):
        bench_breakdown(EMBEDDED_MODEL, more, None)


def test_pages_of_more_than_half_of_the_memory_are_refused() -> None:
    one = planned(BreakdownOptions(streams=(8,)))
    kv_bytes = (one.prefill_pages + one.decode_pages) * one.config.kv.page_size * one.census.kv_bytes_per_token
    allowed, more = (BreakdownOptions(streams=(int(8 * memory_bytes() / kv_bytes * share),)) for share in (0.49, 0.51))
    check(planned(allowed), allowed)
    with pytest.raises(ConfigError, match=rf"--streams.*for {more.streams[0]} sequences of 1048 tokens"):
        bench_breakdown(EMBEDDED_MODEL, more, None)
