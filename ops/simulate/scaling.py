"""The autoscaler's place in the simulation: signals from simulated members, and orders to them."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

import numpy as np

from cluster.autoscaling.autoscaler import REDUNDANCY, Fleet, PoolDecision, State, decide
from cluster.autoscaling.prospects import prospects
from cluster.autoscaling.signals import ExpertSignals, MemberSample, PoolSignals, Prospect, Signals
from octet.config import OctetConfig
from octet.ids import WorkerId
from ops.simulate.outcome import Action

if TYPE_CHECKING:
    from ops.simulate.simulation import Simulation


class Scaling:
    """Looks every `metrics_interval_s`, over the last `look_back_period_s`."""

    def __init__(self, simulation: Simulation, config: OctetConfig, slots_that_fit: int) -> None:
        self._simulation, self._config, self._slots_that_fit = simulation, config.autoscaler, slots_that_fit
        self._fleet = Fleet(
            gpus_per_member={
                "prefill": config.pools.prefill.num_gpus or 1,
                "decode": config.pools.decode.num_gpus or 1,
                "experts": config.pools.experts.num_gpus or 1,
            },
            max_batch=config.decode.max_batch,
        )
        self._state = State()
        self.actions: list[Action] = []
        looks = max(1, round(self._config.look_back_period_s / self._config.metrics_interval_s))
        self._prefill: dict[int, collections.deque[tuple[float, float]]] = {}
        self._arrived: collections.deque[float] = collections.deque(maxlen=looks)
        self._busy: collections.deque[tuple[float, float]] = collections.deque(maxlen=looks)
        self._looks = looks
        self._asked: tuple[object, ...] = ()
        self._prospects: tuple[Prospect, ...] = ()

    def step(self) -> None:
        now_s = self._simulation.clock.now_s
        decision, self._state = decide(now_s, self._signals(), self._config, self._fleet, self._state)
        for one in decision.actions:
            self._act(one)

    def _act(self, one: PoolDecision) -> None:
        fleet, now_s = self._simulation.fleet, self._simulation.clock.now_s
        action = Action(at_s=now_s, pool=one.pool, before=one.current, after=one.target, reason=one.reason)
        self.actions.append(action)
        if one.pool == REDUNDANCY:
            fleet.resize_redundancy(one.target)
        elif one.target > one.current:
            fleet.order(one.pool, one.target - one.current)
        else:
            fleet.drain(one.pool, one.current - one.target)

    def _signals(self) -> Signals:
        simulation, interval_s = self._simulation, self._config.metrics_interval_s
        self._arrived.append(simulation.arrived_tokens / interval_s)
        of_all, of_decode = simulation.busy_s
        self._busy.append((of_all / interval_s, of_decode / interval_s))
        simulation.arrived_tokens, simulation.busy_s = 0.0, [0.0, 0.0]
        return Signals(
            period_s=interval_s * len(self._arrived),
            queued_prompt_tokens=float(
                sum(task.expected for worker in simulation.fleet.prefill.values() for task in worker.waiting)
            ),
            arriving_prompt_tokens_per_s=sum(self._arrived) / len(self._arrived),
            requests_waiting=simulation.waiting,
            prefill=self._prefill_signals(),
            decode=self._decode_signals(),
            experts=self._expert_signals(),
        )

    def _prefill_signals(self) -> PoolSignals:
        simulation, interval_s = self._simulation, self._config.metrics_interval_s
        samples = []
        for number in simulation.fleet.members.serving("prefill"):
            worker = simulation.fleet.prefill[number]
            looks = self._prefill.setdefault(number, collections.deque(maxlen=self._looks))
            looks.append((worker.busy_s, worker.computed))
            worker.busy_s = worker.computed = 0.0
            elapsed_s = interval_s * len(looks)
            samples.append(
                MemberSample(
                    worker_id=WorkerId(f"prefill-{number}"),
                    age_s=simulation.fleet.members.age_s("prefill", number, simulation.clock.now_s),
                    busy_share=min(1.0, sum(busy_s for busy_s, _ in looks) / elapsed_s),
                    tokens_per_s=sum(tokens for _, tokens in looks) / elapsed_s,
                    kv_occupancy=worker.kv_share,
                    ongoing=len(worker.running),
                )
            )
        return self._pool("prefill", samples)

    def _decode_signals(self) -> PoolSignals:
        simulation = self._simulation
        samples = [
            MemberSample(
                worker_id=WorkerId(f"decode-{row}"),
                age_s=simulation.fleet.members.age_s("decode", row, simulation.clock.now_s),
                busy_share=float(simulation.decode.batch[row] > 0),
                tokens_per_s=float(simulation.decode.batch[row] / simulation.decode.step_s[row]),
                kv_occupancy=simulation.decode.held_pages(row) / simulation.decode.pages,
                ongoing=float(simulation.decode.batch[row]),
                waiting=len(simulation.decode.offers[row]),
            )
            for row in simulation.fleet.members.serving("decode")
        ]
        return self._pool("decode", samples)

    def _pool(self, pool: str, samples: list[MemberSample]) -> PoolSignals:
        simulation = self._simulation
        ratios = simulation.slo_ratios[pool]
        while ratios and ratios[0][0] < simulation.clock.now_s - self._config.look_back_period_s:
            ratios.popleft()
        return PoolSignals(
            members=tuple(samples),
            num_starting=simulation.fleet.members.num_starting(pool),
            num_draining=len(simulation.fleet.members.draining(pool)),
            slo_ratio=float(np.percentile([ratio for _, ratio in ratios], 95)) if ratios else None,
            expert_wait_share=simulation.times.wait_share[pool],
        )

    def _expert_signals(self) -> ExpertSignals:
        simulation = self._simulation
        experts = simulation.fleet.experts
        busy, of_decode = (sum(column) / len(self._busy) for column in zip(*self._busy, strict=True))
        return ExpertSignals(
            members=tuple(
                MemberSample(
                    worker_id=WorkerId(f"experts-{number}"),
                    age_s=simulation.fleet.members.age_s("experts", number, simulation.clock.now_s),
                    busy_share=min(1.0, busy),
                )
                for number in simulation.fleet.members.serving("experts")
            ),
            num_starting=simulation.fleet.members.num_starting("experts"),
            num_draining=len(simulation.fleet.members.draining("experts")),
            decode_share=of_decode / busy if busy > 0 else 0.0,
            balancedness=experts.level,
            num_redundant_experts=experts.num_redundant,
            slots_that_fit=self._slots_that_fit,
            num_experts=experts.placement.num_experts,
            prospects=self._promises(),
        )

    def _promises(self) -> tuple[Prospect, ...]:
        """Asked anew when the loads or the placement are others."""
        experts = self._simulation.fleet.experts
        key = (id(experts.loads_LE), experts.num_shards, experts.placement.slots_per_shard)
        if key != self._asked and experts.balances:
            self._asked = key
            self._prospects = prospects(
                experts.loads_LE,
                experts.num_shards,
                experts.placement.slots_per_shard,
                self._slots_that_fit,
                self._config.experts.max_redundant_experts,
            )
        return self._prospects
