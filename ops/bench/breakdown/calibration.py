"""What the pools of a breakdown are asked for so that costs can be fitted to it, again and again if need be."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Sequence

from cluster.plan import ServingPlan
from octet.errors import ConfigError
from ops.bench.breakdown.analysis import ServedStep, serve, steady
from ops.bench.breakdown.costs import Costs, fit_costs
from ops.bench.breakdown.processes import Pools
from ops.bench.breakdown.records import ShardCall, Step
from ops.bench.machine import memory_bytes
from ops.local import make_request

_TIMEOUT_S = 300.0
_LEAST_S = 1e-6
"""That anything takes."""
_LONG_SEQUENCES = 8
_MOVES, _STEPS_AFTER = 5, 6
"""Hand-offs of one sequence by itself, for each length, and steps that follow."""
_HANDOFF_TOKENS = 2 + _STEPS_AFTER
_PAGE_SIZE = 16
_MOST_MEMORY = 0.5
"""Of this machine's, for the KV pages of both workers; weights, and whatever else runs, need the rest."""

Prompts = Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BreakdownOptions:
    streams: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    long_prompt_tokens: int = 1024
    """Of 8 more sequences, from which the costs learn what a context costs."""
    new_tokens: int = 24
    rounds: int = 5
    shards: int = 2

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: hand-offs have a few steps after them, however few tokens are asked for."""
        return max(self.prompt_tokens, self.long_prompt_tokens) + max(self.new_tokens, _HANDOFF_TOKENS)

    @property
    def sequences(self) -> int:
        """At once, at most."""
        return max(*self.streams, _LONG_SEQUENCES)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """What one batch of requests left behind."""

    decode: list[Step]
    prefill: list[Step]
    calls: list[list[ShardCall]]
    tokens_s: list[list[float]]
    """By request: when its tokens came."""

    def served(self, num_sequences: int) -> list[ServedStep]:
        """Steady decode steps of so many sequences."""
        return serve(steady(self.decode, num_sequences), self.calls)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Taken without probes."""

    decode: list[ServedStep] = dataclasses.field(default_factory=list)
    calls: list[ShardCall] = dataclasses.field(default_factory=list)
    prefill: list[Step] = dataclasses.field(default_factory=list)
    handoffs: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Bytes, and seconds."""

    def __add__(self, other: Samples) -> Samples:
        return Samples(
            decode=self.decode + other.decode,
            calls=self.calls + other.calls,
            prefill=self.prefill + other.prefill,
            handoffs=self.handoffs + other.handoffs,
        )

    def costs(self) -> Costs:
        return fit_costs(self.decode, self.calls, self.prefill, self.handoffs)


def values(model_dir: str, options: BreakdownOptions) -> dict[str, object]:
    """Of the configuration: pools of one worker each, with pages for all of the load."""
    pages = 2 * options.sequences * -(-options.longest // _PAGE_SIZE)
    return {
        "model.path": model_dir,
        "pools.experts.size": options.shards,
        "kv.page_size": _PAGE_SIZE,
        "kv.prefill_pages": pages,
        "kv.decode_pages": pages,
    }


def check(plan: ServingPlan, options: BreakdownOptions) -> None:
    """Raises: ConfigError where the longest sequence does not fit the model's context, or the KV pages take more of
    this machine's memory than they may."""
    if options.longest > plan.max_model_len:
        raise ConfigError(
            "--prompt-tokens, --long-prompt-tokens",
            f"{options.longest} tokens with the new ones",
            f"at most the model's {plan.max_model_len}",
        )
    page_bytes = _PAGE_SIZE * plan.census.kv_bytes_per_token
    needed, most = (plan.prefill_pages + plan.decode_pages) * page_bytes, int(_MOST_MEMORY * memory_bytes())
    if needed > most:
        raise ConfigError(
            "--streams, --prompt-tokens, --long-prompt-tokens",
            f"KV pages of {needed / 2**30:.1f} GiB for {options.sequences} sequences of {options.longest} tokens",
            f"at most {most / 2**30:.1f} GiB on this machine",
            "ask for fewer or shorter ones",
        )


def make_prompts(plan: ServingPlan, count: int, num_tokens: int) -> list[list[int]]:
    """That no prefix cache knows."""
    return [random.choices(range(plan.model.vocab_size), k=num_tokens) for _ in range(count)]


def run(pools: Pools, prompts: Prompts, new_tokens: int) -> Run:
    requests = [make_request(prompt, max_new_tokens=new_tokens) for prompt in prompts]
    tokens_s = pools.generate(requests, _TIMEOUT_S)
    return Run(
        decode=pools.decode.call("take"),
        prefill=pools.prefill.call("take"),
        calls=[shard.call("take") for shard in pools.shards],
        tokens_s=tokens_s,
    )


def prompts_and_handoffs(
    pools: Pools, plan: ServingPlan, options: BreakdownOptions, batches: Sequence[Prompts]
) -> Samples:
    """Prefill of new prompts, which afterwards come from the prefix cache together; long contexts; hand-offs."""
    new = [run(pools, prompts, 2) for prompts in batches]
    long_prompts = make_prompts(plan, _LONG_SEQUENCES, options.long_prompt_tokens)
    new.append(run(pools, long_prompts, 2))
    # Once more: they are decoded together.
    long = run(pools, long_prompts, options.new_tokens)
    return Samples(
        decode=long.served(_LONG_SEQUENCES),
        calls=[call for one in (*new, long) for of_shard in one.calls for call in of_shard],
        prefill=[step for one in new for step in one.prefill],
        handoffs=[_moved(pools, plan, count) for count in (options.prompt_tokens, options.long_prompt_tokens)],
    )


def decoded(pools: Pools, prompts: Prompts, new_tokens: int) -> Samples:
    """Prompts that come from the prefix cache."""
    one = run(pools, prompts, new_tokens)
    return Samples(decode=one.served(len(prompts)), calls=[call for of_shard in one.calls for call in of_shard])


def samples(pools: Pools, plan: ServingPlan, options: BreakdownOptions) -> Samples:
    """All that costs are fitted to."""
    batches = [make_prompts(plan, count, options.prompt_tokens) for count in options.streams]
    found = prompts_and_handoffs(pools, plan, options, batches)
    for _ in range(options.rounds):
        for prompts in batches:
            found += decoded(pools, prompts, options.new_tokens)
    return found


def _moved(pools: Pools, plan: ServingPlan, num_tokens: int) -> tuple[int, float]:
    """Hand sequences over that nothing else runs beside.

    Returns: bytes, and how much later than after a step their second tokens came (median).
    """
    found = []
    for _ in range(_MOVES):
        one = run(pools, make_prompts(plan, 1, num_tokens), _HANDOFF_TOKENS)
        first_s, *later_s = (after - before for before, after in itertools.pairwise(one.tokens_s[0]))
        found.append(first_s - statistics.median(later_s))
    return num_tokens * plan.census.kv_bytes_per_token, max(statistics.median(found), _LEAST_S)
