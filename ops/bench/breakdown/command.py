"""`octet bench breakdown`: runs the pools, takes their steps apart, and puts the floor beside them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import random
import statistics
import tempfile
from collections.abc import Sequence

from cluster.plan import ServingPlan
from cluster.planning import make_plan
from octet.config import load_config
from octet.errors import StartupError
from ops.bench.breakdown.analysis import ServedStep, middle_half, serve, steady, summarize
from ops.bench.breakdown.costs import fit_costs
from ops.bench.breakdown.floor import Work, attention_work, expert_work
from ops.bench.breakdown.processes import Pools
from ops.bench.breakdown.records import ShardCall, Step
from ops.bench.breakdown.report import DecodeCase, PrefillCase, Report, as_json, print_report
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.machine import Machine, Rates, cpu_rates, describe
from ops.bench.turns import turn_s
from ops.local import make_request

_ELEMENT_BYTES = 4
_TIMEOUT_S = 300.0
_LEAST_S = 1e-6
"""That anything takes."""
_LONG_SEQUENCES = 8
_MOVES, _STEPS_AFTER = 5, 6
"""Hand-offs of one sequence by itself, for each length, and steps that follow."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownOptions:
    streams: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    long_prompt_tokens: int = 1024
    """Of 8 more sequences, from which the costs learn what a context costs."""
    new_tokens: int = 24
    rounds: int = 5
    shards: int = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _Run:
    """What one batch of requests left behind."""

    decode: list[Step]
    prefill: list[Step]
    calls: list[list[ShardCall]]
    tokens_s: list[list[float]]
    """By request: when its tokens came."""


def bench_breakdown(model_dir: pathlib.Path | None, options: BreakdownOptions, json_file: pathlib.Path | None) -> None:
    """Print the table; with `json_file`, write the same numbers and the fitted costs there. Raises: OctetError."""
    machine = describe()
    with tempfile.TemporaryDirectory() as scratch:
        if model_dir is None:
            model_dir = pathlib.Path(scratch)
            write_checkpoint(model_dir, BENCH)
        plan = make_plan(load_config(overrides=_overrides(model_dir, options)))
        pools = Pools(plan)
        try:
            report = _measure(pools, plan, machine, options)
        finally:
            pools.close()
    print_report(report)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(report), indent=2) + "\n")


def _overrides(model_dir: pathlib.Path, options: BreakdownOptions) -> list[str]:
    page_size = 16
    longest = max(options.prompt_tokens, options.long_prompt_tokens) + options.new_tokens
    sequences = max(*options.streams, _LONG_SEQUENCES)
    pages = 2 * sequences * -(-longest // page_size)
    return [
        f"model.path={model_dir}",
        f"pools.experts.size={options.shards}",
        f"kv.page_size={page_size}",
        f"kv.prefill_pages={pages}",
        f"kv.decode_pages={pages}",
    ]


def _measure(pools: Pools, plan: ServingPlan, machine: Machine, options: BreakdownOptions) -> Report:
    """Rounds go through all numbers of sequences, with probes and without: the machine's moods hit all alike."""
    rates = _rates(plan)
    batches = {count: _prompts(plan, count, options.prompt_tokens) for count in options.streams}
    _run(pools, _prompts(plan, 2, options.prompt_tokens), options.new_tokens)
    # Before any probe is in, for the costs: prompts that no prefix cache knows, and long contexts.
    new = [_run(pools, prompts, 2) for prompts in batches.values()]
    long_prompts = _prompts(plan, _LONG_SEQUENCES, options.long_prompt_tokens)
    new.append(_run(pools, long_prompts, 2))
    # Once more: from the prefix cache they come together, and are decoded together.
    long = _run(pools, long_prompts, options.new_tokens)
    moved = [_moved(pools, plan, count) for count in (options.prompt_tokens, options.long_prompt_tokens)]
    probed: dict[int, list[ServedStep]] = {count: [] for count in options.streams}
    plain: dict[int, list[ServedStep]] = {count: [] for count in options.streams}
    calls = [call for run in (*new, long) for of_shard in run.calls for call in of_shard]
    for _ in range(options.rounds):
        for on, kept in ((True, probed), (False, plain)):
            pools.probe(on)
            for count, prompts in batches.items():
                run = _run(pools, prompts, options.new_tokens)
                kept[count] += _served(run, count)
                calls += [] if on else [call for of_shard in run.calls for call in of_shard]
    pools.probe(True)
    chunks = _run(pools, _prompts(plan, options.streams[-1], options.prompt_tokens), 2)
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
        costs=fit_costs(
            [*_served(long, _LONG_SEQUENCES), *(step for kept in plain.values() for step in kept)],
            calls,
            [step for run in new for step in run.prefill],
            moved,
        ),
        turn_s=turn_s(),
    )


def _run(pools: Pools, prompts: Sequence[Sequence[int]], new_tokens: int) -> _Run:
    requests = [make_request(prompt, max_new_tokens=new_tokens) for prompt in prompts]
    tokens_s = pools.generate(requests, _TIMEOUT_S)
    return _Run(
        decode=pools.decode.call("take"),
        prefill=pools.prefill.call("take"),
        calls=[shard.call("take") for shard in pools.shards],
        tokens_s=tokens_s,
    )


def _moved(pools: Pools, plan: ServingPlan, num_tokens: int) -> tuple[int, float]:
    """Hand sequences over that nothing else runs beside.

    Returns: bytes, and how much later than after a step their second tokens came (median).
    """
    found = []
    for _ in range(_MOVES):
        run = _run(pools, _prompts(plan, 1, num_tokens), 2 + _STEPS_AFTER)
        first_s, *later_s = (after - before for before, after in itertools.pairwise(run.tokens_s[0]))
        found.append(first_s - statistics.median(later_s))
    return num_tokens * plan.census.kv_bytes_per_token, max(statistics.median(found), _LEAST_S)


def _served(run: _Run, num_sequences: int) -> list[ServedStep]:
    return serve(steady(run.decode, num_sequences), run.calls)


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


def _prefill_case(plan: ServingPlan, run: _Run) -> PrefillCase | None:
    """Whole chunks; None if the prompts were too short for one."""
    whole = [step for step in run.prefill if step.num_tokens == plan.config.prefill.chunk_tokens]
    served = serve(whole, run.calls)
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


def _prompts(plan: ServingPlan, count: int, num_tokens: int) -> list[list[int]]:
    return [random.choices(range(plan.model.vocab_size), k=num_tokens) for _ in range(count)]


def _median_step_s(steps: Sequence[ServedStep]) -> float:
    return statistics.median(served.step.lap.total_s for served in steps)
