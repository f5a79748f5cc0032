"""One prefill worker in simulated time: queue, chunks, pages and prefix cache, chunk by chunk."""

from __future__ import annotations

import collections
import dataclasses

from ops.simulate.load import BLOCK_TOKENS, Request
from prefill.queue import STEPPED_BACK


@dataclasses.dataclass(slots=True, eq=False)
class Task:
    """A request in a prefill worker."""

    number: int
    request: Request
    pages: int
    expected: int
    """Tokens that the scheduler thought it would have to compute."""
    decode: int
    """The decode worker that will go on with it."""
    done: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """What one step computes."""

    parts: tuple[tuple[Task, int], ...]
    """Tasks, and tokens of each."""
    tokens: int
    attended: float
    """Positions attended to, summed over the tokens."""
    behind: bool = False
    """Computed by threads that have stepped back behind those of other members."""


class PrefillWorker:
    """Requests are computed first come, first served, as `prefill.queue` has it; their pages are allocated at once."""

    def __init__(self, number: int, pages: int, page_size: int, max_running: int, few_requests: int = 0) -> None:
        """
        Args:
            few_requests: it steps back while it has no more than so many.
        """
        self.number = number
        self.waiting: collections.deque[Task] = collections.deque()
        self.running: list[Task] = []
        self.chunk: Chunk | None = None
        self.paces = 0
        """So many times it was said how long a chunk takes."""
        self.queued_tokens = 0
        """Sent to this worker and not answered: what the frontend knows."""
        self.busy_s = self.computed = 0.0
        """Seconds and tokens since the autoscaler looked last."""
        self._pages, self._page_size, self._max_running = pages, page_size, max_running
        self._few_requests = few_requests
        self._held = 0
        self._left, self._chunk_s, self._at_s = 0.0, 0.0, 0.0
        """Share of the chunk that is left, what all of it would take, and when that was so."""
        self._cache: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def idle(self) -> bool:
        """Nothing here, and nothing leased to a decode worker either."""
        return not self.waiting and not self.running and self._held == 0 and self.chunk is None

    @property
    def kv_share(self) -> float:
        return self._held / self._pages

    def add(self, task: Task) -> None:
        self.waiting.append(task)
        self.queued_tokens += task.expected

    def next_chunk(self, budget: int, steps_back: bool = False) -> Chunk | None:
        """Admit what fits, and pack up to `budget` tokens. None if there is nothing to compute.

        Args:
            steps_back: take less than the budget while few requests are here, as beside a decode worker.
        """
        while self.waiting and len(self.running) < self._max_running:
            task = self.waiting[0]
            if self._held + task.pages > self._pages:
                break
            self.waiting.popleft()
            self._held += task.pages
            # The last token is always computed: the next one is sampled from it.
            task.done = min(self.cached_blocks(task.request.blocks) * BLOCK_TOKENS, task.request.prompt_tokens - 1)
            self.running.append(task)
        behind = len(self.running) + len(self.waiting) <= self._few_requests
        if behind and steps_back:
            budget = max(1, budget // STEPPED_BACK)
        parts, tokens, attended = [], 0, 0.0
        for task in self.running:
            take = min(budget - tokens, task.request.prompt_tokens - task.done)
            if take == 0:
                break
            parts.append((task, take))
            tokens += take
            attended += take * (task.done + (take + 1) / 2)
        self.chunk = Chunk(tuple(parts), tokens, attended, behind) if parts else None
        self._left, self._chunk_s = 1.0, 0.0
        return self.chunk

    def pace(self, now_s: float, chunk_s: float) -> float:
        """From now on the whole chunk would take so long. Returns: seconds for what is left of it."""
        self.paces += 1
        before_s = 0.0
        if self._chunk_s > 0:
            before_s = self._left * self._chunk_s - (now_s - self._at_s)
            self._left = max(before_s, 0.0) / self._chunk_s
        left_s = self._left * chunk_s
        # Counted ahead, as far as is known.
        self.busy_s += left_s - before_s
        self._chunk_s, self._at_s = chunk_s, now_s
        return left_s

    def finish_chunk(self) -> tuple[list[Task], list[int], list[int]]:
        """Returns: tasks whose prompt is computed; blocks that the cache has learned, and those that it has lost."""
        assert self.chunk is not None
        finished, learned = [], []
        for task, take in self.chunk.parts:
            if task not in self.running:
                continue
            task.done += take
            if task.done == task.request.prompt_tokens:
                self.running.remove(task)
                self.queued_tokens -= task.expected
                finished.append(task)
                for block in task.request.blocks[: task.request.prompt_tokens // BLOCK_TOKENS]:
                    if block not in self._cache:
                        learned.append(block)
                    self._cache[block] = None
                    self._cache.move_to_end(block)
        self.chunk = None
        return finished, learned, self._evict()

    def drop(self, task: Task) -> None:
        """Nobody wants it any more; a chunk under way is computed to its end."""
        if task in self.running:
            self.running.remove(task)
            self._held -= task.pages
        else:
            self.waiting.remove(task)
        self.queued_tokens -= task.expected

    def release(self, task: Task) -> None:
        """Its pages have moved on, or are no longer wanted."""
        self._held -= task.pages

    def forget(self) -> list[int]:
        """The cache goes with the worker. Returns: what it knew."""
        blocks = list(self._cache)
        self._cache.clear()
        return blocks

    def cached_blocks(self, blocks: tuple[int, ...]) -> int:
        known = 0
        for block in blocks:
            if block not in self._cache:
                break
            self._cache.move_to_end(block)
            known += 1
        return known

    def _evict(self) -> list[int]:
        # Pages that requests hold are not there for the cache; what they share is counted on both sides.
        room = (self._pages - self._held) * self._page_size // BLOCK_TOKENS
        lost = []
        while len(self._cache) > max(room, 0):
            block, _ = self._cache.popitem(last=False)
            lost.append(block)
        return lost
