"""`octet bench simulator`: one closed loop on real clusters of this machine and on simulated ones, at three sizes.

What members cost is measured of plain processes (`ops.bench.breakdown`), right before and after each cluster: the speed
of a machine moves, and a ratio is of one time. As many shards compute there at once as can in the cluster: one that has
the memory for itself reads an expert faster than two do. What all other processes take of the shared cores (frontend,
Ray, the bench as a client) is measured of each cluster with half the streams, as processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import tempfile
import uuid
from collections.abc import Mapping

from cluster.planning import make_plan
from octet.config import OctetConfig, load_config
from ops.bench.breakdown.calibration import BreakdownOptions, Samples, check, make_prompts, run, samples, values
from ops.bench.breakdown.costs import Costs
from ops.bench.breakdown.processes import Pools
from ops.bench.checkpoints import BENCH, write_checkpoint
from ops.bench.machine import Machine, describe
from ops.bench.simulator.measured import Loop, Seen, started
from ops.bench.simulator.report import Compared, Round, Sizes, as_json, print_report
from ops.bench.simulator.simulated import simulated
from ops.bench.turns import turn_s
from ops.simulate.costs import CPU, Calibration, calibrated, from_rates
from ops.simulate.shape import shape_of

_SIZES: tuple[Sizes, ...] = ((1, 1, 1), (1, 1, 2), (1, 2, 3))
_ELEMENT_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorOptions:
    rounds: int = 3
    streams: int = 8
    requests: int = 48
    prompt_tokens: int = 128
    new_tokens: int = 32

    @property
    def loop(self) -> Loop:
        return Loop(
            streams=self.streams,
            requests=self.requests,
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
        )

    def breakdown(self, shards: int) -> BreakdownOptions:
        """Batches and contexts of about the sizes that the loop has."""
        return BreakdownOptions(
            streams=tuple(sorted({1, max(1, self.streams // 2), self.streams})),
            prompt_tokens=self.prompt_tokens,
            long_prompt_tokens=4 * self.prompt_tokens,
            rounds=2,
            shards=shards,
        )


class _Calibrator:
    """Pools of plain processes that stay for all rounds, and wait while clusters run. Close it."""

    def __init__(self, model_dir: str, options: BreakdownOptions) -> None:
        """Raises: OctetError."""
        self.shards, self._options = options.shards, options
        self._plan = make_plan(load_config(values=values(model_dir, options)))
        check(self._plan, options)
        self.worker_threads = self._plan.threads["decode"]
        self._pools = Pools(self._plan)
        try:
            run(self._pools, make_prompts(self._plan, 2, options.prompt_tokens), options.new_tokens)
        except BaseException:
            self.close()
            raise

    def samples(self) -> Samples:
        return samples(self._pools, self._plan, self._options)

    def close(self) -> None:
        self._pools.close()


def bench_simulator(options: SimulatorOptions, json_file: pathlib.Path | None) -> None:
    """Print the ratios; with `json_file`, write them and what they are of there. Raises: OctetError."""
    machine = describe()
    with tempfile.TemporaryDirectory() as model_dir, contextlib.ExitStack() as stack:
        write_checkpoint(pathlib.Path(model_dir), BENCH)
        calibrators: dict[int, _Calibrator] = {}
        for shards in sorted({_at_once(sizes, machine) for sizes in _SIZES}):
            calibrators[shards] = _Calibrator(model_dir, options.breakdown(shards))
            stack.callback(calibrators[shards].close)
        rounds = [_round(calibrators, model_dir, machine, options) for _ in range(options.rounds)]
    print_report(machine, rounds)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(machine, dataclasses.asdict(options), rounds), indent=2) + "\n")


def _at_once(sizes: Sizes, machine: Machine) -> int:
    """Shards that compute at the same time at most: each has one thread."""
    return min(sizes[2], machine.cores)


def _round(
    calibrators: Mapping[int, _Calibrator], model_dir: str, machine: Machine, options: SimulatorOptions
) -> Round:
    """All that is measured first, so that simulating disturbs none of it."""
    turn, seen = turn_s(), dict[Sizes, tuple[OctetConfig, _Calibrator, Costs, Seen]]()
    for sizes in _SIZES:
        calibrator = calibrators[_at_once(sizes, machine)]
        config = _config(model_dir, sizes, calibrator.worker_threads)
        before = calibrator.samples()
        real = asyncio.run(_measured(config, options.loop))
        seen[sizes] = config, calibrator, (before + calibrator.samples()).costs(), real
    shape = shape_of(model_dir, _ELEMENT_BYTES)
    alone = from_rates(CPU, shape, shape.num_experts, machine.cores)
    compared = []
    for sizes, (config, calibrator, measured, real) in seen.items():
        calibration = Calibration(
            costs=dataclasses.asdict(measured),
            worker_threads=calibrator.worker_threads,
            num_shards=calibrator.shards,
            turn_s=turn,
        )
        costs = dataclasses.replace(
            calibrated(alone, calibration, shape),
            others_cores=real.others.cores,
            others_per_token_s=real.others.per_token_s,
        )
        compared.append(
            Compared(
                sizes=sizes,
                measured=real.figures,
                cores=real.cores,
                simulated=simulated(config, sizes, shape, costs, options.loop),
                costs=measured,
                others=real.others,
            )
        )
    return Round(turn_s=turn, compared=compared)


async def _measured(config: OctetConfig, loop: Loop) -> Seen:
    async with started(config, loop) as cluster:
        return await cluster.measure()


def _config(model_dir: str, sizes: Sizes, worker_threads: int) -> OctetConfig:
    """With as many threads as what the costs were measured with."""
    pools = dict(zip(("prefill", "decode", "experts"), sizes, strict=True))
    given: dict[str, object] = {"model.path": model_dir, "kv.memory_gib": 0.25, "frontend.port": 0}
    given |= {f"pools.{pool}.{field}": value for pool, size in pools.items() for field, value in
              (("size", size), ("threads", 1 if pool == "experts" else worker_threads))}  # fmt: skip
    given["ray.namespace"] = f"octet-{uuid.uuid4().hex[:8]}"
    return load_config(values=given)
