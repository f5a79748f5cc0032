"""The simulation: events in the order of their time, and the deciding code of the cluster between them.

A request arrives, is scheduled (`cluster.frontend.scheduler`), waits for its prefill worker and is computed chunk by
chunk, moves to its decode worker when that has room until its end (`decode.admission`), gets its tokens, and ends. When
a member is lost, what was there is scheduled again. What is not simulated: single decode steps (`decode_pool`), single
frames at the shards (`contention`), speculation.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cluster.frontend.admission import Demand, admit
from cluster.frontend.load_meter import LoadMeter
from cluster.frontend.scheduler import Wait
from cluster.frontend.slo import Slo
from cluster.members import POOLS
from octet.background import share_behind
from octet.config import OctetConfig
from ops.simulate import decode_pool
from ops.simulate.clock import Clock
from ops.simulate.costs import Costs
from ops.simulate.decode_pool import DecodePool
from ops.simulate.expert_loads import ExpertLoads
from ops.simulate.expert_pool import ExpertOptions, ExpertPool
from ops.simulate.fleet import Fleet
from ops.simulate.load import Request
from ops.simulate.losses import Losses
from ops.simulate.outcome import End, Moment, Run, Served
from ops.simulate.prefill_worker import Chunk, PrefillWorker, Task
from ops.simulate.scaling import Scaling
from ops.simulate.shape import Shape
from ops.simulate.step_times import StepTimes
from ops.simulate.views import Views, number_of

_MOMENT_S = 10.0
_REBALANCE_S = 60.0
_FOR_EVER_S = 1e9


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    sizes: dict[str, int]
    """To begin with; and to the end without `autoscale`."""
    redundant: int
    slots_that_fit: int
    prefill_pages: int
    decode_pages: int
    autoscale: bool
    balance: bool
    gpu: bool
    seed: int
    tick_s: float = 1.0
    """How often waits at the shards and the lengths of steps are worked out anew."""
    streams: int | None = None
    """A closed loop: so many users, each of whom asks again when an answer is complete; arrival times are ignored."""
    lose_every_s: float | None = None
    """On average, a member is lost, any of those that serve."""
    most_members: int = 4096
    """Decode workers over all time."""


class Simulation:
    """Run once."""

    def __init__(
        self,
        requests: Sequence[Request],
        loads: ExpertLoads,
        shape: Shape,
        costs: Costs,
        config: OctetConfig,
        options: Options,
    ) -> None:
        self._requests, self._shape, self._costs = list(requests), shape, costs
        self._config, self._options = config, options
        self._shared = costs.cores > 0
        self.clock = Clock()
        most_tokens = max(config.prefill.chunk_tokens, config.decode.max_batch)
        experts = ExpertPool(
            loads,
            shape,
            costs,
            options.sizes["experts"],
            options.redundant,
            ExpertOptions(balance=options.balance, gpu=options.gpu, most_tokens=most_tokens, seed=options.seed),
        )
        self.decode = DecodePool(
            options.most_members,
            options.decode_pages,
            config.kv.page_size,
            config.decode.max_batch,
            whole_steps=self._shared,
        )
        self._views = Views(self.decode, config.prefill.prefix_cache)
        self.fleet = Fleet(
            self.clock,
            costs,
            config,
            options.prefill_pages,
            self.decode,
            experts,
            self._views,
            options.slots_that_fit,
        )
        weight_behind = share_behind(config.pools.prefill.niceness)
        self.times = StepTimes(shape, costs, config.lane.ping_pong_rows, weight_behind, self.decode, experts)
        scaler = config.autoscaler
        self._slo = Slo(
            ttft_s=scaler.target_ttft_s,
            ttft_per_1k_tokens_s=scaler.target_ttft_per_1k_tokens_s,
            tpot_s=scaler.target_tpot_s,
        )
        self._scaling = Scaling(self, config, options.slots_that_fit) if options.autoscale else None
        self._losses = Losses(self, options.lose_every_s, options.seed) if options.lose_every_s else None
        self._served: list[Served | None] = [None] * len(requests)
        self._first: dict[int, tuple[float, float]] = {}
        """When the first token of a live request came, and how long after its arrival."""
        self._done: collections.Counter[int] = collections.Counter()
        """Tokens of a live request that came before it began again."""
        self._restarts: collections.Counter[int] = collections.Counter()
        self.stalled_until_s = 0.0
        """Until experts that were lost are somewhere else, no step goes on."""
        self._leases: dict[int, tuple[PrefillWorker, Task]] = {}
        self._meter = LoadMeter()
        self._held: set[int] = set()
        """Requests for which there is no worker at all."""
        self._live = self._arrived = 0
        self._moments: list[Moment] = []
        self._seen = (0, 0.0)
        """Arrivals and tokens at the last moment."""
        self.arrived_tokens = 0.0
        """Prompt tokens to compute that have come since the autoscaler looked last."""
        self.busy_s = [0.0, 0.0]
        """Busy share times seconds since then, of all frames and of decode frames."""
        self.slo_ratios: dict[str, collections.deque[tuple[float, float]]] = {
            "prefill": collections.deque(),
            "decode": collections.deque(),
        }
        """(when, what it took ÷ what its target allows)."""

    def run(self) -> Run:
        started_s = time.perf_counter()
        self.fleet.begin(self._options.sizes)
        self._look()
        self.clock.every(self._options.tick_s, self._tick)
        self.clock.every(_MOMENT_S, self._look)
        self.clock.every(_REBALANCE_S, self.fleet.rebalance)
        if self._losses is not None:
            self._losses.begin()
        if self._scaling is not None:
            self.clock.every(self._config.autoscaler.metrics_interval_s, self._scaling.step)
        while self._live or self._held or self._arrived < len(self._requests):
            self._next()
        self._look()
        return Run(
            served=tuple(one for one in self._served if one is not None),
            moments=tuple(self._moments),
            actions=tuple(self._scaling.actions) if self._scaling is not None else (),
            duration_s=self.clock.now_s,
            gpu_hours=self.fleet.gpu_hours(),
            slots_filled=self.fleet.slots_filled,
            wall_s=time.perf_counter() - started_s,
            lost=self._losses.num_lost if self._losses is not None else 0,
            restarts=self._restarts.total(),
        )

    @property
    def waiting(self) -> int:
        """Requests that wait for their first token, or for a place in a decode worker."""
        return len(self._held) + self._live - int(self.decode.batch[: self.decode.num_rows].sum())

    def _next(self) -> None:
        """Whatever comes first: an arrival, an end of a sequence, or another event."""
        arrival_s = self._next_arrival_s()
        end_s, row = self.decode.next_end()
        if arrival_s <= end_s and arrival_s <= self.clock.next_s:
            self.clock.advance(arrival_s)
            number = self._arrived
            self._arrived += 1
            self._requests[number] = dataclasses.replace(self._requests[number], at_s=self.clock.now_s)
            self._arrive(number)
        elif end_s <= self.clock.next_s:
            self.clock.advance(end_s)
            self._leave(row)
        else:
            self.clock.happen()

    def _next_arrival_s(self) -> float:
        if self._arrived == len(self._requests):
            return float("inf")
        if self._options.streams is None:
            return self._requests[self._arrived].at_s
        return self.clock.now_s if self._live + len(self._held) < self._options.streams else float("inf")

    def _arrive(self, number: int) -> None:
        request = self._requests[number]
        if self._pages(request.prompt_tokens + request.new_tokens) > min(
            self._options.prefill_pages, self._options.decode_pages
        ):
            self._end(number, "refused")
            return
        self._held.discard(number)
        demand = self._demand(request)
        if admit(demand, self._meter.backlog(0), self._meter.rates, self._config.frontend) is not None:
            self._end(number, "shed")
            return
        if not self._send(number, request):
            # A pool is at zero: the frontend holds the request until there is a worker.
            self._held.add(number)
            self.clock.after(self._options.tick_s, self._arrive, number)
            return
        self._live += 1
        self._meter.accept(demand, self.clock.now_s)

    def restart(self, number: int, num_tokens: int) -> None:
        """Compute a request again, from its prompt and the tokens that there are; unless it was too often already.

        Args:
            num_tokens: that it got since it began last.
        """
        if self._restarts[number] == self._config.frontend.max_attempts:
            self._close(number)
            self._end(number, "failed")
            return
        self._restarts[number] += 1
        self._done[number] += num_tokens
        self._send_again(number)

    def _send_again(self, number: int) -> None:
        request, done = self._requests[number], self._done[number]
        again = dataclasses.replace(
            request, prompt_tokens=request.prompt_tokens + done, new_tokens=request.new_tokens - done
        )
        if not self._send(number, again):
            self.clock.after(self._options.tick_s, self._send_again, number)

    def _send(self, number: int, request: Request) -> bool:
        """To the workers that the scheduler chooses. Returns: whether there are any."""
        decision, known = self._views.schedule(request)
        if isinstance(decision, Wait):
            return False
        task = Task(
            number=number,
            request=request,
            pages=self._pages(request.prompt_tokens),
            expected=request.prompt_tokens - known,
            decode=number_of(decision.decode),
        )
        self.arrived_tokens += task.expected
        self._views.promise(task.decode, task.pages)
        worker = self.fleet.prefill[number_of(decision.prefill)]
        worker.add(task)
        self._views.look_at_prefill(worker)
        self._start_chunk(worker)
        return True

    def _start_chunk(self, worker: PrefillWorker) -> None:
        """Compute what comes next, unless it computes something."""
        if worker.chunk is not None:
            return
        chunk = worker.next_chunk(self._config.prefill.chunk_tokens, steps_back=self._shared)
        if chunk is not None:
            worker.computed += chunk.tokens
            self._settle()
            if not self._shared:
                self._set_chunk(worker, chunk)

    def _set_chunk(self, worker: PrefillWorker, chunk: Chunk) -> None:
        """What is left of it goes on as fast as everything goes now."""
        left_s = worker.pace(self.clock.now_s, self.times.chunk_s(chunk))
        left_s += max(0.0, self.stalled_until_s - self.clock.now_s)
        self.clock.after(left_s, self._finish_chunk, worker, worker.paces)

    def _finish_chunk(self, worker: PrefillWorker, pace: int) -> None:
        if pace != worker.paces:
            # It has gone on faster or more slowly since it was thought to end now.
            return
        finished, learned, lost = worker.finish_chunk()
        self._settle()
        self._views.learn(worker.number, learned, lost)
        for task in finished:
            self._first_token(worker, task)
        self._views.look_at_prefill(worker)
        self._start_chunk(worker)
        self.fleet.release_if_drained("prefill", worker.number)

    def _first_token(self, worker: PrefillWorker, task: Task) -> None:
        request, now_s = task.request, self.clock.now_s
        if task.number not in self._first:
            ttft_s = now_s - request.at_s
            self._first[task.number] = now_s, ttft_s
            self._meter.prefilled(self._demand(request), now_s)
            self.slo_ratios["prefill"].append((now_s, self._slo.first_ratio(ttft_s, request.prompt_tokens)))
        self._leases[task.number] = (worker, task)
        if request.new_tokens == 1:
            self._take_lease(task.number)
            self._views.ended(task.decode)
            self._finish(task.number)
            self.fleet.release_if_drained("decode", task.decode)
            return
        self.decode.offers[task.decode].append(
            decode_pool.Sequence(
                number=task.number,
                prompt_tokens=request.prompt_tokens,
                new_tokens=request.new_tokens,
                pages=self._pages(request.prompt_tokens + request.new_tokens),
            )
        )
        self._pull(task.decode)

    def _pull(self, row: int) -> None:
        for sequence in self.decode.pull(row):
            num_bytes = sequence.prompt_tokens * self._shape.kv_bytes
            took_s = self._costs.handoff_fixed_s + num_bytes * self._costs.handoff_per_byte_s
            self.clock.after(took_s, self._join, row, sequence)

    def _join(self, row: int, sequence: decode_pool.Sequence) -> None:
        if sequence not in self.decode.incoming[row]:
            # One of the two workers was lost meanwhile.
            return
        self._take_lease(sequence.number)
        self.decode.join(row, sequence, self.clock.now_s)
        self._set_step(row)

    def _steps_s(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        if self.clock.now_s < self.stalled_until_s:
            return np.full(len(rows), _FOR_EVER_S)
        return self.times.decode_steps_s(rows)

    def lose_prefill(self, number: int) -> None:
        """What it computes, and what it has computed and not handed over, begins again."""
        worker = self.fleet.lose_prefill(number)
        leased = [(task, 1) for holder, task in self._leases.values() if holder is worker]
        for task, _ in leased:
            del self._leases[task.number]
            self.decode.withdraw(task.decode, task.number)
        for task, num_tokens in [*((task, 0) for task in (*worker.running, *worker.waiting)), *leased]:
            self._views.arrived(task.decode, task.pages)
            self._views.ended(task.decode)
            self.fleet.release_if_drained("decode", task.decode)
            self.restart(task.number, num_tokens)

    def lose_decode(self, row: int) -> None:
        """What it has, and what was to come to it, begins again."""
        self.fleet.lose_decode(row)
        again = [(sequence.number, num_tokens) for sequence, num_tokens in self.decode.lose(row, self.clock.now_s)]
        for number, _ in again:
            if number in self._leases:
                self._take_lease(number)
        for worker in list(self.fleet.prefill.values()):
            for task in [task for task in (*worker.running, *worker.waiting) if task.decode == row]:
                worker.drop(task)
                again.append((task.number, 0))
            self._views.look_at_prefill(worker)
            self.fleet.release_if_drained("prefill", worker.number)
        for number, num_tokens in again:
            self.restart(number, num_tokens)
        self._settle()

    def lose_shard(self, number: int) -> None:
        """Every step waits until what only it held is somewhere else."""
        self.stalled_until_s = max(self.stalled_until_s, self.clock.now_s + self.fleet.lose_shard(number))
        self._update()
        for worker in self.fleet.prefill.values():
            if worker.chunk is not None:
                self._set_chunk(worker, worker.chunk)
        self.clock.after(self.stalled_until_s - self.clock.now_s, self._go_on)

    def _go_on(self) -> None:
        self._update()

    def _take_lease(self, number: int) -> None:
        """The prompt's pages have moved, or nobody wants them: the prefill worker has room again."""
        worker, task = self._leases.pop(number)
        worker.release(task)
        self._views.arrived(task.decode, task.pages)
        self._start_chunk(worker)
        self.fleet.release_if_drained("prefill", worker.number)

    def _leave(self, row: int) -> None:
        now_s = self.clock.now_s
        for sequence in self.decode.leave(row, now_s):
            after_s = now_s - self._first[sequence.number][0]
            new_tokens = self._requests[sequence.number].new_tokens
            self.slo_ratios["decode"].append((now_s, self._slo.answer_ratio(after_s, new_tokens)))
            self._views.ended(row)
            self._finish(sequence.number)
        self._pull(row)
        self._set_step(row)
        self.fleet.release_if_drained("decode", row)

    def _set_step(self, row: int) -> None:
        self._settle()
        rows = decode_pool.one(row)
        self.decode.set_step(row, float(self._steps_s(rows)[0]) if self.decode.batch[row] > 0 else 1.0)
        self._views.look_at_decode(row)

    def _demand(self, request: Request) -> Demand:
        return Demand(
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            longest_answer=request.new_tokens,
            priority=0,
            timeout_s=self._config.frontend.default_timeout_s,
        )

    def _finish(self, number: int) -> None:
        first_s, ttft_s = self._first[number]
        more = self._requests[number].new_tokens - 1
        tpot_s = (self.clock.now_s - first_s) / more if more else 0.0
        self._close(number)
        self._end(number, "finished", ttft_s, tpot_s)

    def _close(self, number: int) -> None:
        self._live -= 1
        # Single tokens are not told to the meter, so admission goes by requests and prompts, and not by decode's rate.
        demand = self._demand(self._requests[number])
        prefilled = self._first.pop(number, None) is not None
        self._meter.end(demand, 0, prefilled=prefilled, finished=False, now_s=self.clock.now_s)
        del self._done[number]

    def _end(self, number: int, end: End, ttft_s: float = 0.0, tpot_s: float = 0.0) -> None:
        assert self._served[number] is None, f"request {number} ends twice"
        request = self._requests[number]
        self._served[number] = Served(
            at_s=request.at_s,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            end=end,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            in_slo=end == "finished" and self._slo.keeps(ttft_s, tpot_s, request.prompt_tokens, request.new_tokens),
        )

    def _tick(self) -> None:
        """Bring all steps up to date with what everyone does now."""
        rows = self._update()
        contention = self.times.contention
        self.busy_s[0] += contention.busy_share * self._options.tick_s
        self.busy_s[1] += contention.decode_busy_share * self._options.tick_s
        for row in rows.tolist():
            self._views.look_at_decode(row)

    def _settle(self) -> None:
        """Where members share cores, everything that begins or ends changes at once how fast the others go on.
        Elsewhere it is one of many, and the next tick is soon enough."""
        if self._shared:
            self._update()
            for worker in self.fleet.prefill.values():
                if worker.chunk is not None:
                    self._set_chunk(worker, worker.chunk)

    def _update(self) -> npt.NDArray[np.int64]:
        """Returns: the decode workers that run something."""
        rows = self.decode.advance_all(self.clock.now_s)
        workers = self.fleet.prefill.values()
        self.times.update(rows, [worker.chunk for worker in workers if worker.chunk is not None])
        self.decode.set_steps(rows, self._steps_s(rows))
        return rows

    def _look(self) -> None:
        now_s, members = self.clock.now_s, self.fleet.members
        elapsed_s = now_s - self._moments[-1].at_s if self._moments else 0.0
        serving = members.serving("decode")
        held = sum(self.decode.held_pages(row) for row in serving)
        arrived, tokens = self._arrived, float(self.decode.tokens.sum())
        self._moments.append(
            Moment(
                at_s=now_s,
                sizes={pool: members.num_held(pool) for pool in POOLS},
                serving={pool: len(members.serving(pool)) for pool in POOLS},
                arrivals_per_s=(arrived - self._seen[0]) / elapsed_s if elapsed_s > 0 else 0.0,
                queued_prompt_tokens=float(sum(worker.queued_tokens for worker in self.fleet.prefill.values())),
                live=self._live,
                shard_busy=self.times.contention.busy_share,
                kv_occupancy=held / max(1, len(serving)) / self._options.decode_pages,
                balancedness=self.fleet.experts.level,
                tokens_per_s=(tokens - self._seen[1]) / elapsed_s if elapsed_s > 0 else 0.0,
            )
        )
        self._seen = (arrived, tokens)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.kv.page_size)
