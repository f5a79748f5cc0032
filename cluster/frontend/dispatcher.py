"""Where live requests are computed: sends them to workers, and again to others when workers are lost or fail."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from cluster.frontend.live_requests import LiveRequest, LiveRequests
from cluster.frontend.prefix_index import PrefixIndex
from cluster.frontend.scheduler import Wait, schedule
from cluster.frontend.workload import Workload
from cluster.plan import ServingPlan
from octet.errors import UnavailableError
from octet.ids import RequestId, WorkerId
from octet.mailbox import AsyncMailbox
from octet.messages import Abort, Evicted, Failed, PrefillRequest, TokenEvent, WorkerLoad, unpack_ids

_log = logging.getLogger(__name__)

_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0
"""Where every worker has failed a request, it is tried again after this long, doubled each time up to the second."""

GiveUp = Callable[[LiveRequest, str], None]
Sent = Callable[[int, int], None]
"""Prompt tokens, and those of them that are probably cached."""


class Dispatcher:
    """Belongs to the frontend's event loop. A live choice has a stage where it is computed, or it waits here."""

    def __init__(
        self, plan: ServingPlan, mailbox: AsyncMailbox, live: LiveRequests, give_up: GiveUp, sent: Sent
    ) -> None:
        """
        Args:
            give_up: called with a request that was computed too often in vain, and the reason.
            sent: told of every prompt that is sent to a prefill worker.
        """
        self._sent = sent
        self._mailbox, self._live, self._give_up = mailbox, live, give_up
        self._max_attempts = plan.config.frontend.max_attempts
        self._workload = Workload(plan.config.kv.page_size, plan.decode_pages)
        self._max_batch = plan.config.decode.max_batch
        remembered = plan.prefill_pages if plan.config.prefill.prefix_cache else 0
        self._prefixes = PrefixIndex([], plan.config.kv.page_size, remembered)
        self._addresses: dict[WorkerId, str] = {}
        self._waiting: list[_Waiting] = []

    def set_workers(
        self, prefill: Mapping[WorkerId, str], decode: Mapping[WorkerId, str], draining: Collection[WorkerId]
    ) -> None:
        """See `Frontend.set_workers`."""
        before, self._addresses = self._addresses, {**prefill, **decode}
        gone = before.keys() - self._addresses.keys()
        self._mailbox.disconnect(gone)
        self._mailbox.connect(self._addresses)
        self._workload.set_workers(prefill, decode, draining)
        self._prefixes.set_workers(prefill)
        for live in self._live.all():
            lost = [choice for choice, stage in live.stages.items() if any(stage.depends_on(worker) for worker in gone)]
            if lost:
                self._again(live, lost, f"{', '.join(sorted(gone))} left the cluster")
        self._start_again(self._waiting)

    def report(self, worker_id: WorkerId, load: WorkerLoad) -> bool:
        """Note a worker's load. Returns: whether it is one of ours."""
        known = self._workload.knows(worker_id)
        if known:
            self._workload.report(worker_id, load)
        return known

    def start(self, live: LiveRequest, request: PrefillRequest, avoid: Collection[WorkerId] = ()) -> None:
        """Send choices of a request on their way, or keep them until somebody may take them."""
        token_ids = unpack_ids(request.token_ids)
        # What is known of an answer is computed again, and kept nowhere.
        prompt_ids = token_ids[: request.num_prompt_tokens]
        cached_tokens = self._prefixes.cached_tokens(prompt_ids)
        decision = schedule(self._workload.prefill_views(cached_tokens), self._workload.decode_views(), avoid)
        if isinstance(decision, Wait):
            due_s = self._try_later(live, request) if avoid else math.inf
            self._waiting.append(_Waiting(live=live, request=request, reason=decision.reason, due_s=due_s))
            return
        self._prefixes.sent(decision.prefill, prompt_ids)
        self._sent(len(token_ids), cached_tokens[decision.prefill])
        live.stages |= self._workload.assign(
            request.choices, request.attempt, len(token_ids), cached_tokens[decision.prefill], decision
        )
        self._send(decision.prefill, dataclasses.replace(request, decode_worker=decision.decode))

    def note_token(self, live: LiveRequest, event: TokenEvent, worker_id: WorkerId) -> None:
        """A token of the live attempt was committed. A worker that does not know that the choice is over is told."""
        stage = live.stages.get(event.choice)
        if stage is None:
            return
        self._workload.note_token(stage, worker_id)
        if live.journal.has_ended(event.choice):
            self._workload.drop(live.stages.pop(event.choice))
            if event.finish_reason is None:
                self.abort(stage.decode, live.request_id, event.choice, event.attempt)

    def evicted(self, live: LiveRequest, event: Evicted) -> None:
        """Compute a choice of the live attempt again. Its worker has let go of it already."""
        self._workload.drop(live.stages.pop(event.choice))
        for request in live.journal.compute_again([event.choice]):
            self.start(live, request)

    def failed(self, live: LiveRequest, event: Failed, worker_id: WorkerId) -> None:
        """Compute a choice of the live attempt again, elsewhere if there is another worker, and otherwise later."""
        live.failed_on.setdefault(event.choice, set()).add(worker_id)
        self._again(live, [event.choice], event.reason)

    def waits_for(self, live: LiveRequest) -> str:
        """Why nobody computes a request's choices, or an empty string."""
        return next((each.reason for each in self._waiting if each.live is live), "")

    def forget(self, live: LiveRequest) -> None:
        """A request has ended; whoever still computes some of it shall not."""
        self._waiting = [each for each in self._waiting if each.live is not live]
        told = {(worker, stage.attempt) for stage in live.stages.values() for worker in (stage.prefill, stage.decode)}
        for stage in live.stages.values():
            self._workload.drop(stage)
        live.stages.clear()
        for worker_id, attempt in sorted(told):
            self.abort(worker_id, live.request_id, None, attempt)

    def abort(self, worker_id: WorkerId, request_id: RequestId, choice: int | None, attempt: int) -> None:
        self._send(worker_id, Abort(request_id=request_id, choice=choice, attempt=attempt))

    @property
    def unanswered_prompt_tokens(self) -> int:
        """Sent to prefill workers and not answered, or not even sent."""
        waiting = sum(each.request.num_tokens for each in self._waiting)
        return self._workload.unanswered_prompt_tokens + waiting

    def free_places(self, num_tokens: int) -> int:
        """For sequences of so many tokens, in the decode workers' batches."""
        return self._workload.free_places(num_tokens, self._max_batch)

    def close(self) -> None:
        self._waiting.clear()

    def _again(self, live: LiveRequest, choices: list[int], reason: str) -> None:
        for choice in choices:
            live.num_restarts[choice] = live.num_restarts.get(choice, 0) + 1
        most = max(live.num_restarts[choice] for choice in choices)
        if most > self._max_attempts:
            self._give_up(live, f"it was computed again {most - 1} times (frontend.max_attempts), and then: {reason}")
            return
        _log.info("choices %s of request %s start again: %s", choices, live.request_id, reason)
        self._leave_stages(live, choices)
        for request in live.journal.compute_again(choices):
            self._start_avoiding(live, request)

    def _start_avoiding(self, live: LiveRequest, request: PrefillRequest) -> None:
        avoid = set[WorkerId]().union(*(live.failed_on.get(choice, ()) for choice in request.choices))
        self.start(live, request, avoid)

    def _try_later(self, live: LiveRequest, request: PrefillRequest) -> float:
        """Nobody is there but who has failed it. It may have been a passing fault; if not, `set_workers` will say so.

        Returns: when it is tried again.
        """
        for choice in request.choices:
            live.failed_on.pop(choice, None)
        most = max(live.num_restarts.get(choice, 0) for choice in request.choices)
        loop = asyncio.get_running_loop()
        due_s: float = loop.time() + min(_FIRST_RETRY_S * 2 ** max(0, most - 1), _LAST_RETRY_S)
        loop.call_at(due_s, self._start_due, due_s)
        return due_s

    def _start_due(self, now_s: float) -> None:
        self._start_again([each for each in self._waiting if each.due_s <= now_s])

    def _start_again(self, waiting: Sequence[_Waiting]) -> None:
        """Try some of what waits: the workers have changed, or it has waited long enough for one that failed it."""
        tried = {id(each) for each in waiting}
        self._waiting = [each for each in self._waiting if id(each) not in tried]
        for each in sorted(waiting, key=lambda each: (each.request.priority, each.request.arrival_s)):
            wanted = tuple(
                choice for choice in each.request.choices if each.live.journal.is_live(choice, each.request.attempt)
            )
            if each.live.record.outcome is None and wanted:
                self._start_avoiding(each.live, dataclasses.replace(each.request, choices=wanted))

    def _leave_stages(self, live: LiveRequest, choices: Iterable[int]) -> None:
        """Let nobody go on with the attempts of these choices; a prompt that others share goes on for them."""
        left = {choice: live.stages.pop(choice) for choice in choices if choice in live.stages}
        shared = {stage.attempt for stage in live.stages.values()}
        told: dict[tuple[WorkerId, int | None, int], None] = {}
        for choice, stage in left.items():
            self._workload.drop(stage)
            for worker_id in (stage.prefill, stage.decode):
                told[worker_id, choice if stage.attempt in shared else None, stage.attempt] = None
        for worker_id, of_choice, attempt in told:
            self.abort(worker_id, live.request_id, of_choice, attempt)

    def _send(self, to: WorkerId, message: PrefillRequest | Abort) -> None:
        """What a worker does not get, it is going to be replaced for; `set_workers` then makes it good."""
        if to not in self._addresses:
            return
        try:
            self._mailbox.send(to, message)
        except UnavailableError as error:
            _log.warning("a %s is lost: %s", type(message).__name__, error)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Waiting:
    live: LiveRequest
    request: PrefillRequest
    reason: str
    due_s: float
    """When it is tried again, by the event loop's clock; infinite if only other workers can help."""
