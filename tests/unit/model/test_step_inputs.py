"""What captured steps are told, without capturing them."""

from __future__ import annotations

import random

import pytest
import torch

from model.batch import Span, build_batch
from model.pages import PagePool
from model.step_graphs import sizes_up_to
from model.step_inputs import StepInputs

CPU = torch.device("cpu")
PAGE, MOST_ROWS, MOST_PAGES = 4, 12, 80
NOBODYS_SLOT = 10**6


class Sequence:
    """Grows by a token or more a step, and gives the pages of what did not stand back."""

    def __init__(self, pool: PagePool, num_tokens: int) -> None:
        self.pool, self.num_tokens = pool, num_tokens
        self.pages: list[int] = []

    def span(self, count: int) -> Span:
        wanted = self.pool.pages_for(self.num_tokens + count) - len(self.pages)
        allocated = self.pool.allocate(max(0, wanted))
        assert allocated is not None
        self.pages += allocated
        token_ids = [random.randrange(1000) for _ in range(count)]
        return Span(token_ids=token_ids, start=self.num_tokens, pages=self.pages, by_token=True)

    def keep(self, count: int) -> None:
        self.num_tokens += count
        kept = self.pool.pages_for(self.num_tokens)
        self.pool.release(self.pages[kept:])
        del self.pages[kept:]


def told(inputs: StepInputs, num_rows: int) -> list[tuple[int, int, int, list[int]]]:
    """Token, position, slot and pages of each row."""
    batch = inputs.batch(num_rows)
    assert batch.decode is not None
    numbers = (batch.token_ids_T, batch.positions_T, batch.kv_slots_T, batch.decode.lengths_B)
    rows = zip(*(part.tolist() for part in numbers), batch.decode.pages_BP.tolist(), strict=True)
    return [(token, position, slot, pages[: -(-length // PAGE)]) for token, position, slot, length, pages in rows]


def built(spans: list[Span], pool: PagePool) -> list[tuple[int, int, int, list[int]]]:
    batch, _ = build_batch(spans, pool, CPU)
    assert batch.decode is not None
    numbers = (batch.token_ids_T, batch.positions_T, batch.kv_slots_T, batch.decode.lengths_B)
    rows = zip(*(part.tolist() for part in numbers), batch.decode.pages_BP.tolist(), strict=True)
    return [(token, position, slot, pages[: -(-length // PAGE)]) for token, position, slot, length, pages in rows]


@pytest.mark.parametrize("most_drafts", [0, 16])
def test_a_captured_step_is_told_what_a_batch_is_built_of(most_drafts: int) -> None:
    """Also after sequences have grown, given pages back, ended, and others have taken their rows and pages."""
    pool = PagePool(1100, PAGE)
    inputs = StepInputs(MOST_ROWS * (1 + most_drafts), MOST_PAGES, NOBODYS_SLOT, CPU)
    running: list[Sequence] = []
    for _ in range(150):
        random.shuffle(running) if random.random() < 0.1 else None
        long = [sequence for sequence in running if sequence.num_tokens > PAGE * MOST_PAGES - 40]
        for ended in long or random.sample(running, k=len(running) // 5):
            running.remove(ended)
            pool.release(ended.pages)
        while len(running) < MOST_ROWS and random.random() < 0.5:
            running.append(Sequence(pool, random.randint(0, 100)))
        counts = [1 + random.randint(0, most_drafts) for _ in running]
        spans = [sequence.span(count) for sequence, count in zip(running, counts, strict=True)]
        inputs.fill(spans, pool)
        if spans:
            assert told(inputs, sum(counts)) == built(spans, pool)
        for sequence, count in zip(running, counts, strict=True):
            sequence.keep(random.randint(1, count))


def test_what_fills_a_batch_up_attends_to_nothing_and_writes_where_nobody_reads() -> None:
    pool = PagePool(9, PAGE)
    inputs = StepInputs(4, 3, NOBODYS_SLOT, CPU)
    one = Sequence(pool, 6)
    inputs.fill([one.span(3)], pool)
    inputs.fill([one.span(1)], pool)
    batch = inputs.batch(4)
    assert batch.decode is not None
    assert batch.decode.lengths_B.tolist() == [7, 0, 0, 0]
    assert batch.kv_slots_T.tolist()[1:] == [NOBODYS_SLOT] * 3


def test_sizes_cover_every_batch_and_waste_at_most_a_quarter_or_eight() -> None:
    for most_rows in (1, 2, 3, 8, 64, 100, 512):
        sizes = sizes_up_to(most_rows)
        assert sizes[-1] == most_rows
        assert list(sizes) == sorted(set(sizes))
        for num_rows in range(1, most_rows + 1):
            size = next(size for size in sizes if size >= num_rows)
            assert size - num_rows < max(8, num_rows // 4 + 1)
