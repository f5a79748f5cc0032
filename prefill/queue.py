"""Which requests a prefill worker computes next: pure, no tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from octet.ids import RequestId
from octet.messages import PrefillRequest, TokenLogprob, unpack_ids

STEPPED_BACK = 4
"""A worker that steps back for running streams takes this fraction of a chunk: with half of one, the longest gap of a
stream beside prompts of 2,000 tokens was half again as long, and their first tokens came hardly sooner."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Task:
    """A request in this worker. `done` tokens have their KV in `pages`."""

    request: PrefillRequest
    token_ids: list[int]
    pages: list[int] = dataclasses.field(default_factory=list)
    done: int = 0
    num_cached: int = 0
    """Tokens whose KV was found in the prefix cache."""
    prompt_logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)

    @property
    def remaining(self) -> int:
        return len(self.token_ids) - self.done

    @property
    def prompt_ids(self) -> list[int]:
        """Without what is known of the answer, where it is computed again."""
        return self.token_ids[: self.request.num_prompt_tokens]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of a task."""

    task: Task
    stop: int

    @property
    def last(self) -> bool:
        return self.stop == len(self.task.token_ids)


class PrefillQueue:
    """Waiting and running tasks, each in order of (priority, arrival)."""

    def __init__(self, max_running: int) -> None:
        self._max_running = max_running
        self.waiting: list[Task] = []
        self.running: list[Task] = []

    @property
    def num_tasks(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: PrefillRequest) -> None:
        self.waiting.append(Task(request=request, token_ids=unpack_ids(request.token_ids)))
        self.waiting.sort(key=_order)

    def next_to_admit(self) -> Task | None:
        """The first waiting task, if one more may run."""
        return self.waiting[0] if self.waiting and len(self.running) < self._max_running else None

    def admit(self, task: Task, pages: list[int], num_cached: int = 0) -> None:
        """
        Args:
            pages: for all of the task's tokens.
            num_cached: tokens whose KV is in them already.
        """
        self.waiting.remove(task)
        task.pages, task.done, task.num_cached = pages, num_cached, num_cached
        self.running.append(task)
        self.running.sort(key=_order)

    def chunks(self, budget: int) -> list[Chunk]:
        """Pack up to `budget` tokens of running tasks, first come first served."""
        chunks = []
        for task in self.running:
            take = min(budget, task.remaining)
            if take == 0:
                break
            chunks.append(Chunk(task, task.done + take))
            budget -= take
        return chunks

    def next_to_finish(self, budget: int) -> list[Task]:
        """Tasks that a chunk of `budget` tokens would complete, if none of what waits is cached."""
        finished: list[Task] = []
        for task in (*self.running, *self.waiting):
            budget -= task.remaining
            if budget < 0:
                break
            finished.append(task)
        return finished

    def finish(self, task: Task) -> None:
        self.running.remove(task)

    def remove(self, request_id: RequestId, choice: int | None = None, attempt: int | None = None) -> list[Task]:
        """Take out a request's tasks; those of a single choice only where it is all that the task computes."""
        gone = [
            task
            for task in (*self.waiting, *self.running)
            if task.request.request_id == request_id
            and (choice is None or task.request.choices == (choice,))
            and attempt in (None, task.request.attempt)
        ]
        self.waiting = [task for task in self.waiting if task not in gone]
        self.running = [task for task in self.running if task not in gone]
        return gone

    def clear(self) -> Sequence[Task]:
        gone = (*self.waiting, *self.running)
        self.waiting, self.running = [], []
        return gone


def _order(task: Task) -> tuple[int, float]:
    return task.request.priority, task.request.arrival_s
