"""`octet bench breakdown`: runs the pools, takes their steps apart, and puts the floor beside them."""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence

from cluster.plan import ServingPlan
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import StartupError
from ops.bench.breakdown.analysis import ServedStep, middle_half, serve, summarize
from ops.bench.breakdown.calibration import (
    BreakdownOptions,
    Run,
    check,
    decoded,
    make_prompts,
    prompts_and_handoffs,
    run,
    values,
)
from ops.bench.breakdown.floor import Work, attention_work, expert_work
from ops.bench.breakdown.processes import Pools
from ops.bench.breakdown.report import DecodeCase, PrefillCase, Report, as_json, print_report
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.machine import Machine, Rates, cpu_rates, describe
from ops.bench.turns import turn_s

_ELEMENT_BYTES = 4


def bench_breakdown(model_dir: pathlib.Path | None, options: BreakdownOptions, json_file: pathlib.Path | None) -> None:
    """Print the table; with `json_file`, write the same numbers and the fitted costs there. Raises: OctetError."""
    machine = describe()
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            model_dir = pathlib.Path(scratch)
            write_checkpoint(model_dir, BENCH)
        plan = make_plan(load_config(values=values(str(model_dir), options)))
        check(plan, options)
        pools = Pools(plan)
        try:
            report = _measure(pools, plan, machine, options)
        finally:
            pools.close()
    print_report(report)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(report), indent=2) + "\n")


def _measure(pools: Pools, plan: ServingPlan, machine: Machine, options: BreakdownOptions) -> Report:
    """Rounds go through all numbers of sequences, with probes and without: the machine's moods hit all alike."""
    rates = _rates(plan)
    batches = {count: make_prompts(plan, count, options.prompt_tokens) for count in options.streams}
    run(pools, make_prompts(plan, 2, options.prompt_tokens), options.new_tokens)
    # Before any probe is in, for the costs.
    samples = prompts_and_handoffs(pools, plan, options, list(batches.values()))
    probed: dict[int, list[ServedStep]] = {count: [] for count in options.streams}
    plain: dict[int, list[ServedStep]] = {count: [] for count in options.streams}
    for _ in range(options.rounds):
        pools.probe(True)
        for count, prompts in batches.items():
            probed[count] += run(pools, prompts, options.new_tokens).served(count)
        pools.probe(False)
        for count, prompts in batches.items():
            found = decoded(pools, prompts, options.new_tokens)
            plain[count] += found.decode
            samples += found
    pools.probe(True)
    chunks = run(pools, make_prompts(plan, options.streams[-1], options.prompt_tokens), 2)
    pools.probe(False)
    rates = [before.best(after) for before, after in zip(rates, _rates(plan), strict=True)]
    machine_rates, worker_rates, shard_rates = rates
    return Report(
        machine=machine,
        pools=f"1 prefill + 1 decode + {options.shards} shards, threads {plan.threads}, prompts of "
        f"{options.prompt_tokens} tokens, {options.new_tokens} new, {options.rounds} rounds",
        model=_model(plan),
        machine_rates=machine_rates,
        worker_rates=worker_rates,
        shard_rates=shard_rates,
        decode=[_case(plan, count, probed[count], plain[count]) for count in options.streams],
        prefill=_prefill_case(plan, chunks),
        costs=samples.costs(),
        turn_s=turn_s(),
    )


def _case(plan: ServingPlan, count: int, probed: Sequence[ServedStep], plain: Sequence[ServedStep]) -> DecodeCase:
    if not probed or not plain:
        raise StartupError(f"no step of {count} sequences was seen: give more --new-tokens, or fewer sequences")
    breakdown = summarize(probed)
    most, everything = (_expert_work(plan, middle_half(probed), of_all=of_all) for of_all in (False, True))
    return DecodeCase(
        num_sequences=count,
        breakdown=breakdown,
        probed_s=_median_step_s(probed),
        plain_s=_median_step_s(plain),
        experts=most,
        all_experts=everything,
        attention=attention_work(plan.model, count, breakdown.num_attended, _ELEMENT_BYTES),
    )


def _expert_work(plan: ServingPlan, steps: Sequence[ServedStep], *, of_all: bool) -> Work:
    """Of a mean step: of all shards, or of the one in each layer that is asked for most experts."""
    total = Work()
    for served in (one for step in steps for one in step.rounds):
        asked = served.calls if of_all else [max(served.calls, key=lambda call: (call.num_experts, call.num_pairs))]
        for call in asked:
            total += expert_work(plan.model, call.num_experts / len(steps), call.num_pairs / len(steps), _ELEMENT_BYTES)
    return total


def _prefill_case(plan: ServingPlan, chunks: Run) -> PrefillCase | None:
    """Whole chunks; None if the prompts were too short for one."""
    whole = [step for step in chunks.prefill if step.num_tokens == plan.config.prefill.chunk_tokens]
    served = serve(whole, chunks.calls)
    return PrefillCase(num_tokens=served[0].step.num_tokens, breakdown=summarize(served)) if served else None


def _rates(plan: ServingPlan) -> list[Rates]:
    """Of the machine, of the decode worker, and of one shard while all are busy."""
    cores, shards = len(os.sched_getaffinity(0)), plan.config.pools.experts.size
    at_work = min(cores, shards * plan.threads["experts"])
    return [cpu_rates(cores), cpu_rates(plan.threads["decode"]), cpu_rates(at_work).share(shards)]


def _model(plan: ServingPlan) -> dict[str, int]:
    return {
        "layers": plan.model.num_hidden_layers,
        "moe_layers": len(plan.model.moe_layers),
        "hidden_size": plan.model.hidden_size,
        "experts": plan.model.n_routed_experts,
        "experts_per_token": plan.model.num_experts_per_tok,
        "expert_bytes": plan.census.expert_bytes,
        "attention_bytes": plan.census.attention_bytes,
        "kv_bytes_per_token": plan.census.kv_bytes_per_token,
    }


def _median_step_s(steps: Sequence[ServedStep]) -> float:
    return statistics.median(served.step.lap.total_s for served in steps)
