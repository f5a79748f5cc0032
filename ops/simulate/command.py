"""`octet simulate`: reads what is to be simulated, runs it, and shows what came of it."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from cluster.members import POOLS
from octet.config import OctetConfig
from octet.errors import ConfigError
from ops.outputs import check_output
from ops.simulate.costs import CPU, H100, Costs, calibrated, from_rates, read_calibration
from ops.simulate.expert_loads import ExpertLoads, drawn, recorded
from ops.simulate.load import Request, day, enveloped, read_requests, stacked
from ops.simulate.outcome import Result, Run, summarized
from ops.simulate.report import print_result
from ops.simulate.search import search_fixed
from ops.simulate.shape import Shape, shape_of
from ops.simulate.simulation import Options, Simulation

_Number = TypeVar("_Number", int, float)
_PROFILES = {"h100": (H100, 2, 80e9), "cpu": (CPU, 4, 8e9)}
"""Rates, bytes per weight, and memory of a member."""
_WORKING_BYTES = 6e9
"""Of a GPU, for activations and buffers."""
_ROUNDING = 1e-9
"""Of a sum of parts of GPUs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulateOptions:
    """As the command line has them."""

    trace: pathlib.Path
    model: str = "glm-4.6"
    profile: str = "h100"
    calibrate: pathlib.Path | None = None
    gpus: int | None = None
    fixed: tuple[int, int, int] | None = None
    autoscale: bool = False
    search: bool = False
    attainment: float = 0.99
    requests: int | None = None
    copies: int = 1
    time_scale: float = 1.0
    hours: float | None = None
    trough: float | None = None
    experts_trace: pathlib.Path | None = None
    skew: tuple[float, float] = (0.2, 1.0)
    drift: float = 0.0
    drift_every_s: float = 600.0
    redundant: int = 32
    balance: bool = True
    lose_every_s: float | None = None
    price: float = 2.0
    seed: int = 0
    json_file: pathlib.Path | None = None
    plot_file: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Everything that a simulation is made of, but its sizes."""

    requests: list[Request]
    loads: ExpertLoads
    shape: Shape
    costs: Costs
    config: OctetConfig
    options: Options

    @property
    def least_shards(self) -> int:
        """That hold every expert."""
        return -(-self.shape.num_experts // self.options.slots_that_fit)

    def run(self, sizes: dict[str, int], *, autoscale: bool) -> Run:
        options = dataclasses.replace(self.options, sizes=sizes, autoscale=autoscale)
        return Simulation(self.requests, self.loads, self.shape, self.costs, self.config, options).run()


def simulate(config: OctetConfig, options: SimulateOptions) -> Result:
    """Print what came of it; write it as JSON, and draw it, where asked for. Raises: OctetError."""
    _check(options)
    sizes = _sizes(config, options)
    scenario = make_scenario(config, options)
    _check_shards(scenario, sizes["experts"], options)
    if options.search:
        sizes, run = search_fixed(scenario, sizes, options.attainment)
    else:
        run = scenario.run(sizes, autoscale=options.autoscale)
    result = summarized(run, options.price)
    print_result(run, result, scenario.config)
    if options.json_file is not None:
        report: dict[str, Any] = {"sizes": sizes, "result": dataclasses.asdict(result)}
        report["moments"] = [dataclasses.asdict(moment) for moment in run.moments]
        report["actions"] = [dataclasses.asdict(action) for action in run.actions]
        options.json_file.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot_file is not None:
        from ops.simulate.plot import draw_run

        draw_run(options.plot_file, run, result)
    return result


def _check(options: SimulateOptions) -> None:
    """Better before the run than after it, or never. Raises: ConfigError."""
    check_output("--json", options.json_file)
    check_output("--plot", options.plot_file)
    if options.plot_file is not None:
        from ops.bench.plot import require_matplotlib

        require_matplotlib(options.plot_file)
    if options.fixed is not None and min(options.fixed) < 1:
        raise ConfigError("--fixed", ",".join(map(str, options.fixed)), "at least one member of each pool")
    if options.search and options.autoscale:
        raise ConfigError("simulate", "--search-fixed and --autoscale", "one of them: sizes that are sought are fixed")
    if options.gpus is not None and options.search:
        raise ConfigError("simulate", "--search-fixed and --gpus", "one of them: as many are taken as the load needs")
    if options.gpus is not None and options.fixed is not None and not options.autoscale:
        raise ConfigError("simulate", "--fixed and --gpus", "one of them: either gives the sizes")
    low, high = options.skew
    if not 0 <= low <= high < math.inf:
        raise ConfigError("--skew", f"{low:g},{high:g}", "exponents from 0 on, the lower one first")


def _check_shards(scenario: Scenario, num_shards: int, options: SimulateOptions) -> None:
    """Raises: ConfigError where shards have no room for every expert."""
    if num_shards < scenario.least_shards:
        scaled = options.gpus is not None and not options.autoscale
        name = "--fixed" if options.fixed is not None else "--gpus" if scaled else "pools.experts.size"
        each = f"{scenario.shape.num_experts} experts, of which a shard holds {scenario.options.slots_that_fit}"
        raise ConfigError(name, f"{num_shards} shards", f"at least {scenario.least_shards} for {each}")


def numbers(option: str, text: str, kind: Callable[[str], _Number], count: int) -> Any:
    """`count` numbers, separated by commas. Raises: ConfigError."""
    try:
        found = tuple(kind(part) for part in text.split(","))
    except ValueError:
        found = ()
    if len(found) != count:
        raise ConfigError(option, repr(text), f"{count} numbers, separated by commas")
    return found


def make_scenario(config: OctetConfig, options: SimulateOptions) -> Scenario:
    """Raises: ConfigError."""
    if options.profile not in _PROFILES:
        raise ConfigError("--profile", options.profile, f"one of {', '.join(_PROFILES)}")
    rates, element_bytes, member_bytes = _PROFILES[options.profile]
    shape = shape_of(options.model, element_bytes)
    if not shape.moe_layers:
        raise ConfigError("--model", options.model, "a model with MoE layers")
    rng = np.random.default_rng(options.seed)
    requests = _requests(options, rng)
    slot_bytes = len(shape.moe_layers) * shape.expert_bytes
    slots_that_fit = max(1, int((member_bytes - _WORKING_BYTES) // slot_bytes))
    cores = 0
    if options.profile == "cpu":
        cores = 2
    costs = from_rates(rates, shape, min(slots_that_fit, shape.num_experts), cores)
    if options.calibrate is not None:
        costs = calibrated(costs, read_calibration(options.calibrate, shape), shape)
    page_bytes = shape.kv_bytes * config.kv.page_size
    affordable = int(config.kv.memory_gib * 2**30) // page_bytes
    if options.gpus is not None:
        scaler = config.autoscaler.model_copy(update={"max_gpus": float(options.gpus)})
        config = config.model_copy(update={"autoscaler": scaler})
    return Scenario(
        requests=requests,
        loads=_loads(options, shape, rng, requests[-1].at_s),
        shape=shape,
        costs=costs,
        config=config,
        options=Options(
            sizes={},
            redundant=options.redundant,
            slots_that_fit=slots_that_fit,
            prefill_pages=config.kv.prefill_pages or affordable,
            decode_pages=config.kv.decode_pages or affordable,
            autoscale=False,
            balance=options.balance,
            gpu=options.profile != "cpu",
            seed=options.seed,
            lose_every_s=options.lose_every_s,
        ),
    )


def _requests(options: SimulateOptions, rng: np.random.Generator) -> list[Request]:
    requests = stacked(read_requests(options.trace, options.requests), options.copies, rng)
    if options.time_scale != 1:
        requests = [dataclasses.replace(one, at_s=one.at_s / options.time_scale) for one in requests]
    if options.trough is not None:
        duration_s = options.hours * 3600 if options.hours else requests[-1].at_s
        requests = enveloped(requests, duration_s, day(options.trough))
    elif options.hours is not None:
        requests = enveloped(requests, options.hours * 3600, np.ones_like)
    return requests


def _loads(options: SimulateOptions, shape: Shape, rng: np.random.Generator, duration_s: float) -> ExpertLoads:
    sizes = (len(shape.moe_layers), shape.num_experts, shape.experts_per_token)
    if options.experts_trace is not None:
        return recorded(options.experts_trace, *sizes)
    return drawn(*sizes, rng, options.skew, options.drift, options.drift_every_s, duration_s)


def _sizes(config: OctetConfig, options: SimulateOptions) -> dict[str, int]:
    """Raises: ConfigError where they take more than there is."""
    sizes: dict[str, int] = {pool: getattr(config.pools, pool).size for pool in POOLS}
    if options.fixed is not None:
        sizes = dict(zip(POOLS, options.fixed, strict=True))
    if options.gpus is None:
        return sizes
    each: dict[str, float] = {pool: getattr(config.pools, pool).num_gpus or 1 for pool in POOLS}
    if not options.autoscale:
        return divided(options.gpus, sizes, each)
    least: dict[str, int] = {pool: max(sizes[pool], getattr(config.autoscaler, pool).min_replicas) for pool in POOLS}
    _check_budget(options.gpus, least, each, "the sizes with which the pools begin, and their minima")
    return sizes


def divided(gpus: int, sizes: Mapping[str, int], each: Mapping[str, float]) -> dict[str, int]:
    """As many members as so many GPUs are enough for, in the proportions of `sizes`, and at least one of each pool.

    Args:
        each: GPUs of a member.

    Raises: ConfigError if there are too few.
    """
    found = dict.fromkeys(sizes, 1)
    _check_budget(gpus, found, each, "one member of each pool")
    while True:
        # Of those for which there is room, to the one that is then the least ahead of the others.
        left = gpus - sum(found[pool] * each[pool] for pool in found)
        there_is_room = [pool for pool in found if each[pool] <= left + _ROUNDING]
        if not there_is_room:
            return found
        found[min(there_is_room, key=lambda pool: (found[pool] + 1) / sizes[pool])] += 1


def _check_budget(gpus: int, members: Mapping[str, int], each: Mapping[str, float], who: str) -> None:
    """Raises: ConfigError."""
    taken = sum(members[pool] * each[pool] for pool in members)
    if taken > gpus:
        raise ConfigError("--gpus", f"{gpus} GPUs", f"at least {taken:g} for {who}")
