"""All decode workers in simulated time.

Every sequence of a worker gets a token per step, so the worker's steps are a clock: a sequence that joins at step v and
wants n more tokens leaves at step v + n, however long steps become meanwhile. Steps between two events are therefore
not played one by one.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math

import numpy as np
import numpy.typing as npt

from decode.admission import Demand, peak_pages

_INFINITE = float("inf")
_SAME = 1e-6
"""Of a step: what rounding makes of the same one."""


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """A request whose prompt is computed."""

    number: int
    prompt_tokens: int
    new_tokens: int
    """All of them; the first came from prefill."""
    pages: int
    """At its end."""
    end_step: float = 0.0


def one(row: int) -> npt.NDArray[np.int64]:
    """The rows, if there is only one."""
    return np.array([row], dtype=np.int64)


class DecodePool:
    """Workers are rows of arrays. Admission is the real one, told exactly how long answers will be."""

    def __init__(self, capacity: int, pages: int, page_size: int, max_batch: int, *, whole_steps: bool = False) -> None:
        """
        Args:
            whole_steps: a sequence joins when the step under way ends. Where a step is short beside an answer, it may
                as well join at once.
        """
        self._whole_steps = whole_steps
        self.pages, self._page_size, self._max_batch = pages, page_size, max_batch
        self.batch = np.zeros(capacity)
        self.context = np.zeros(capacity)
        """Tokens attended to by a step."""
        self.steps = np.zeros(capacity)
        self.step_s = np.full(capacity, 1.0)
        self.end_step = np.full(capacity, _INFINITE)
        self.at_s = np.zeros(capacity)
        """Up to when the worker's steps are counted."""
        self.ends_s = np.full(capacity, _INFINITE)
        """When the next sequence leaves."""
        self.tokens = np.zeros(capacity)
        self.num_rows = 0
        self.offers: list[collections.deque[Sequence]] = []
        self.incoming: list[list[Sequence]] = []
        self._running: list[list[tuple[float, int, Sequence]]] = []
        self._final_pages: list[int] = []

    def add_row(self, now_s: float) -> int:
        row = self.num_rows
        self.num_rows += 1
        self.at_s[row] = now_s
        self.offers.append(collections.deque())
        self.incoming.append([])
        self._running.append([])
        self._final_pages.append(0)
        return row

    def idle(self, row: int) -> bool:
        return not self._running[row] and not self.incoming[row] and not self.offers[row]

    def held_pages(self, row: int) -> int:
        """Those of sequences on their way here included."""
        reserved = sum(-(-sequence.prompt_tokens // self._page_size) for sequence in self.incoming[row])
        # A half-filled last page per sequence.
        return min(self.pages, int(self.context[row] / self._page_size + self.batch[row] / 2) + reserved)

    def next_end(self) -> tuple[float, int]:
        """(when, in which row) the next sequence leaves."""
        if self.num_rows == 0:
            return _INFINITE, -1
        row = int(self.ends_s[: self.num_rows].argmin())
        return float(self.ends_s[row]), row

    def pull(self, row: int) -> list[Sequence]:
        """Take in, in their order, the offers that there is room for until they end. Their pages are now on the way."""
        taken = []
        while self.offers[row] and self._fits(row, self.offers[row][0]):
            sequence = self.offers[row].popleft()
            self.incoming[row].append(sequence)
            self._final_pages[row] += sequence.pages
            taken.append(sequence)
        return taken

    def join(self, row: int, sequence: Sequence, now_s: float) -> None:
        """The pages have arrived; tokens come from the next step on. Call `set_step` afterwards."""
        self.advance(row, now_s)
        self.incoming[row].remove(sequence)
        begun = float(self.steps[row])
        # A worker that ran nothing begins at once.
        if self._whole_steps and self.batch[row] > 0:
            begun = math.ceil(begun - _SAME)
        sequence.end_step = begun + sequence.new_tokens - 1
        heapq.heappush(self._running[row], (sequence.end_step, sequence.number, sequence))
        self.batch[row] += 1
        self.context[row] += sequence.prompt_tokens + 1

    def leave(self, row: int, now_s: float) -> list[Sequence]:
        """The sequences that have all their tokens now. Call `set_step` afterwards."""
        self.advance(row, now_s)
        gone = []
        heap = self._running[row]
        while heap and heap[0][0] <= self.steps[row] + _SAME:
            _, _, sequence = heapq.heappop(heap)
            self.batch[row] -= 1
            self.context[row] -= sequence.prompt_tokens + sequence.new_tokens
            self._final_pages[row] -= sequence.pages
            gone.append(sequence)
        if not heap:
            self.context[row] = 0.0
        return gone

    def withdraw(self, row: int, number: int) -> None:
        """A sequence whose pages have not arrived does not come."""
        offers, incoming = self.offers[row], self.incoming[row]
        self.offers[row] = collections.deque(one for one in offers if one.number != number)
        self._final_pages[row] -= sum(one.pages for one in incoming if one.number == number)
        self.incoming[row] = [one for one in incoming if one.number != number]

    def lose(self, row: int, now_s: float) -> list[tuple[Sequence, int]]:
        """The worker is gone. Returns: what it had, and how many tokens of each there are."""
        self.advance(row, now_s)
        had = [(one, 1) for one in (*self.offers[row], *self.incoming[row])]
        for end_step, _, one in self._running[row]:
            left = math.ceil(end_step - float(self.steps[row]) - _SAME)
            had.append((one, min(max(1, one.new_tokens - left), one.new_tokens - 1)))
        self.offers[row], self.incoming[row], self._running[row] = collections.deque(), [], []
        self.batch[row] = self.context[row] = 0.0
        self._final_pages[row] = 0
        self.ends_s[row] = self.end_step[row] = _INFINITE
        return had

    def advance(self, row: int, now_s: float) -> None:
        if self.batch[row] > 0:
            done = (now_s - self.at_s[row]) / self.step_s[row]
            self.steps[row] += done
            self.context[row] += done * self.batch[row]
            self.tokens[row] += done * self.batch[row]
        self.at_s[row] = now_s

    def set_step(self, row: int, step_s: float) -> None:
        """From now on a step of this worker takes so long."""
        self.step_s[row] = step_s
        heap = self._running[row]
        self.ends_s[row] = self.at_s[row] + max(heap[0][0] - self.steps[row], 0.0) * step_s if heap else _INFINITE
        self.end_step[row] = heap[0][0] if heap else _INFINITE

    def advance_all(self, now_s: float) -> npt.NDArray[np.int64]:
        """Bring every worker to `now_s`. Returns: the rows that run something."""
        num = self.num_rows
        done = np.where(self.batch[:num] > 0, (now_s - self.at_s[:num]) / self.step_s[:num], 0.0)
        self.steps[:num] += done
        self.context[:num] += done * self.batch[:num]
        self.tokens[:num] += done * self.batch[:num]
        self.at_s[:num] = now_s
        rows: npt.NDArray[np.int64] = np.flatnonzero(self.batch[:num])
        return rows

    def set_steps(self, rows: npt.NDArray[np.int64], step_s: npt.NDArray[np.float64]) -> None:
        self.step_s[rows] = step_s
        self.ends_s[rows] = self.at_s[rows] + np.maximum(self.end_step[rows] - self.steps[rows], 0.0) * step_s

    def _fits(self, row: int, sequence: Sequence) -> bool:
        if self.batch[row] + len(self.incoming[row]) >= self._max_batch:
            return False
        if self._final_pages[row] + sequence.pages <= self.pages:
            return True
        now = [(s.prompt_tokens + s.new_tokens - (end - self.steps[row]), end - self.steps[row])
               for end, _, s in self._running[row]]  # fmt: skip
        now += [(s.prompt_tokens, s.new_tokens) for s in (*self.incoming[row], sequence)]
        demands = [
            Demand(num_tokens=int(held), remaining=max(1, int(left)), siblings=number, shared_pages=0)
            for number, (held, left) in enumerate(now)
        ]
        return peak_pages(demands, self._page_size) <= self.pages
