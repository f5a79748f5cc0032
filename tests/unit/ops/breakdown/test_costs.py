"""Costs are found again in steps that were made from them."""

from __future__ import annotations

import numpy as np
import pytest

from ops.bench.breakdown.analysis import ServedRound, ServedStep
from ops.bench.breakdown.costs import fit_costs, fit_nonnegative
from ops.bench.breakdown.records import Round, ShardCall, Step
from ops.bench.breakdown.stopwatch import Lap


def test_costs_that_made_the_samples_are_found() -> None:
    rng = np.random.default_rng()
    wanted = rng.uniform(0.1, 1.0, 3)
    sizes = np.stack([np.ones(50), rng.integers(1, 33, 50), rng.integers(100, 9000, 50)], axis=1)
    assert fit_nonnegative(sizes, sizes @ wanted) == pytest.approx(wanted)


def test_no_cost_is_negative() -> None:
    sizes = np.stack([np.ones(20), np.arange(1.0, 21.0)], axis=1)
    found = fit_nonnegative(sizes, np.linspace(2.0, 1.0, 20))
    assert found[1] == 0
    assert 1.0 <= found[0] <= 2.0


RECEIVING_S, DECODE_CORES = 1e-4, 1.5


def call(start_s: float, experts: int, pairs: int) -> ShardCall:
    seconds = 1e-4 + 2e-4 * experts + 1e-5 * pairs
    return ShardCall(
        layer=1,
        num_rows=pairs,
        num_pairs=pairs,
        num_experts=experts,
        start_s=start_s,
        stop_s=start_s + seconds,
        processor_s=seconds + RECEIVING_S,
    )


def served(sequences: int, context: int) -> ServedStep:
    """One layer, two shards; what it takes follows the costs that the test expects."""
    num_bytes = 4000 * sequences
    way_s = 5e-4 + 1e-9 * num_bytes
    calls = (call(way_s / 2, 2 + sequences // 4, 4 * sequences), call(way_s / 2, 1, sequences))
    received_s = way_s + max(one.total_s for one in calls)
    own_s = 3e-3 + 2e-4 * sequences + 1e-7 * context
    return ServedStep(
        step=Step(
            lap=Lap(start_s=0.0, stop_s=received_s + own_s, parts={}, running={}),
            num_sequences=sequences,
            num_tokens=sequences,
            num_attended=context,
            rounds=(),
            processor_s=DECODE_CORES * (own_s + way_s - RECEIVING_S),
        ),
        rounds=(
            ServedRound(
                round=Round(layer=1, num_bytes=num_bytes, sent_s=0.0, wait_s=0.0, received_s=received_s), calls=calls
            ),
        ),
    )


def test_attention_experts_and_exchange_are_told_apart() -> None:
    steps = [served(sequences, context) for sequences in (1, 8, 32) for context in (200, 1000, 40_000)]
    calls = [one for step in steps for one in step.rounds[0].calls]
    prefill = [
        Step(
            lap=Lap(start_s=0.0, stop_s=1e-2 + 1e-3 * tokens + 1e-8 * attended, parts={}, running={}),
            num_sequences=1,
            num_tokens=tokens,
            num_attended=attended,
            rounds=(),
            processor_s=4e-3 + 1.2e-3 * tokens + 2e-8 * attended,
        )
        for tokens, attended in ((128, 8256), (512, 131_000), (512, 400_000), (300, 90_000))
    ]
    # A hiccup of the machine, which no cost explains.
    calls.append(ShardCall(layer=1, num_rows=1, num_pairs=1, num_experts=1, start_s=0.0, stop_s=5.0, processor_s=5.0))
    costs = fit_costs(steps, calls, prefill, [(1_000_000, 4e-3), (9_000_000, 2e-2)])
    assert costs.attention.seconds(8, 1000) == pytest.approx(3e-3 + 1.6e-3 + 1e-4)
    assert costs.attention.per_attended_s == pytest.approx(1e-7)
    assert costs.expert.seconds(3, 12) == pytest.approx(1e-4 + 6e-4 + 1.2e-4)
    assert costs.exchange.seconds(10_000) == pytest.approx(5e-4 + 1e-5)
    assert costs.prefill.seconds(256, 32_896) == pytest.approx(1e-2 + 0.256 + 32_896e-8)
    assert costs.handoff.fixed_s == pytest.approx(2e-3)
    assert costs.handoff.per_byte_s == pytest.approx(2e-9)
    assert costs.processor.prefill.seconds(256, 32_896) == pytest.approx(4e-3 + 0.3072 + 32_896 * 2e-8)
    assert costs.processor.expert.seconds(3, 12) == pytest.approx(1e-4 + 6e-4 + 1.2e-4 + RECEIVING_S)
    assert costs.processor.decode_cores == pytest.approx(DECODE_CORES)
    assert costs.error["decode_step"] == pytest.approx(0, abs=1e-6)
