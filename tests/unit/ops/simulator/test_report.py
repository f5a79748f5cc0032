"""Quotients are taken within a round."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from ops.bench.breakdown.costs import (
    AttentionCosts,
    Costs,
    ExchangeCosts,
    ExpertCosts,
    HandoffCosts,
    PrefillCosts,
    ProcessorCosts,
)
from ops.bench.machine import Machine
from ops.bench.simulator.report import Compared, Figures, Others, Round, Sizes, as_json, print_report, spreads

SIZES: Sizes = (1, 2, 3)
MACHINE = Machine(cpu="a", cores=2, memory_gib=1, gpu="", python="3", torch="2", date="2026-11-29", load=0.0)
_EXPERT = ExpertCosts(fixed_s=1e-4, per_expert_s=1e-5, per_pair_s=1e-6)
_PREFILL = PrefillCosts(fixed_s=1e-2, per_token_s=1e-4, per_attended_s=1e-7)
COSTS = Costs(
    attention=AttentionCosts(fixed_s=1e-3, per_sequence_s=1e-4, per_attended_s=1e-7),
    expert=_EXPERT,
    exchange=ExchangeCosts(fixed_s=1e-4, per_byte_s=1e-9),
    prefill=_PREFILL,
    handoff=HandoffCosts(fixed_s=1e-3, per_byte_s=1e-9),
    processor=ProcessorCosts(decode_cores=1.4, prefill=_PREFILL, expert=_EXPERT),
    error={},
)


def round_(measured: float, simulated: float) -> Round:
    def figures(speed: float) -> Figures:
        return Figures(tokens_per_s=100 * speed, ttft_s=1 / speed, tpot_s=0.02 / speed)

    compared = Compared(
        sizes=SIZES,
        measured=figures(measured),
        cores={"decode": 0.5, "others": 0.2},
        simulated=figures(simulated),
        costs=COSTS,
        others=Others(cores=0.05, per_token_s=7e-4),
    )
    return Round(turn_s=0.004, compared=[compared])


def test_a_machine_that_gets_faster_between_rounds_changes_no_ratio() -> None:
    ratios = spreads([round_(1.0, 1.1), round_(2.0, 2.2), round_(3.0, 3.3)])[SIZES]
    assert ratios["tokens_per_s"].lowest == pytest.approx(1.1)
    assert ratios["tokens_per_s"].highest == pytest.approx(1.1)
    assert ratios["tpot_s"].median == pytest.approx(1 / 1.1)


def test_medians_and_ranges_over_the_rounds_are_shown_and_written() -> None:
    rounds = [round_(1.0, 0.9), round_(1.0, 1.0), round_(1.0, 1.25)]
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        print_report(MACHINE, rounds, console)
    assert "1 + 2 + 3     100.0        1.00  0.90 to 1.25" in captured.get()
    report = json.loads(json.dumps(as_json(MACHINE, {"streams": 8}, rounds)))
    assert report["ratios"][0]["sizes"] == [1, 2, 3]
    assert report["ratios"][0]["tokens_per_s"] == pytest.approx({"median": 1.0, "lowest": 0.9, "highest": 1.25})
    assert report["rounds"][1]["compared"][0]["costs"]["processor"]["decode_cores"] == 1.4
