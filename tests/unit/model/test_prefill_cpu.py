from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from model.batch import Batch, Span, build_batch
from model.pages import PagePool
from model.prefill_cpu import PrefillAttention

NUM_PAGES, PAGE_SIZE = 80, 16
SCALE = 0.3
CPU = torch.device("cpu")


class Sequence:
    """One of so many tokens, with pages from anywhere, and its queries at all positions."""

    def __init__(self, num_tokens: int, pages: list[int], heads: tuple[int, int, int]) -> None:
        num_q, num_kv, dim = heads
        self.num_tokens, self.pages = num_tokens, pages
        self.q_TQD = torch.randn(num_tokens, num_q, dim) * 3
        self.k_TND, self.v_TND = torch.randn(2, num_tokens, num_kv, dim)

    def span(self, start: int, stop: int) -> Span:
        return Span(token_ids=range(start, stop), start=start, pages=self.pages)

    def expected(self) -> torch.Tensor:
        group = self.q_TQD.shape[1] // self.k_TND.shape[1]
        k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (self.k_TND, self.v_TND))
        out = F.scaled_dot_product_attention(self.q_TQD.double().transpose(0, 1), k, v, is_causal=True, scale=SCALE)
        return out.transpose(0, 1).float()


class Cache:
    def __init__(self, heads: tuple[int, int, int]) -> None:
        self.pool = PagePool(NUM_PAGES, PAGE_SIZE)
        self.k, self.v = torch.zeros(2, NUM_PAGES * PAGE_SIZE, *heads[1:])

    def write(self, sequence: Sequence) -> None:
        slots = self.pool.slots(sequence.pages, 0, sequence.num_tokens)
        self.k[slots], self.v[slots] = sequence.k_TND, sequence.v_TND

    def attend(self, batch: Batch, q_TQD: torch.Tensor) -> torch.Tensor:
        out_TQD = torch.full_like(q_TQD, torch.nan)
        assert batch.prefill_table is not None
        attend = PrefillAttention(batch.prefill_table, batch.kv_slots_T, PAGE_SIZE, SCALE)
        attend(q_TQD.numpy(), self.k.numpy(), self.v.numpy(), out_TQD.numpy())
        return out_TQD


@pytest.fixture(params=[(4, 1, 64), (6, 3, 20), (8, 8, 16), (3, 1, 5)], ids=str)
def heads(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    found: tuple[int, int, int] = request.param
    return found


@pytest.fixture
def sequences(heads: tuple[int, int, int]) -> list[Sequence]:
    pages = random.sample(range(NUM_PAGES), NUM_PAGES)
    lengths = [random.randint(2, 17), random.randint(120, 140), random.randint(250, 500)]
    return [Sequence(length, [pages.pop() for _ in range(-(-length // PAGE_SIZE))], heads) for length in lengths]


def test_spans_attend_to_themselves_and_to_all_before_them(
    heads: tuple[int, int, int], sequences: list[Sequence]
) -> None:
    cache = Cache(heads)
    starts = [0, random.randrange(100), random.randrange(240)]
    for sequence in sequences:
        cache.write(sequence)
    spans = [one.span(start, one.num_tokens) for one, start in zip(sequences, starts, strict=True)]
    batch, rows = build_batch(spans, cache.pool, CPU)
    queries = torch.cat([one.q_TQD[start:] for one, start in zip(sequences, starts, strict=True)])
    found = cache.attend(batch, queries)
    expected = torch.cat([one.expected()[start:] for one, start in zip(sequences, starts, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert rows[-1].stop == len(found)


def test_a_row_is_the_same_however_its_prompt_is_cut(heads: tuple[int, int, int], sequences: list[Sequence]) -> None:
    cache, sequence = Cache(heads), sequences[-1]
    cache.write(sequence)
    whole, _ = build_batch([sequence.span(0, sequence.num_tokens)], cache.pool, CPU)
    expected = cache.attend(whole, sequence.q_TQD)
    cuts = sorted({1, *random.sample(range(2, sequence.num_tokens - 1), 4), sequence.num_tokens - 1})
    for start, stop in zip([0, *cuts], [*cuts, sequence.num_tokens], strict=True):
        part, _ = build_batch([sequence.span(start, stop)], cache.pool, CPU)
        found = cache.attend(part, sequence.q_TQD[start:stop].contiguous())
        torch.testing.assert_close(found, expected[start:stop], rtol=0, atol=0)


def test_rows_of_other_spans_are_left_alone(heads: tuple[int, int, int], sequences: list[Sequence]) -> None:
    cache = Cache(heads)
    short, middle, _ = sequences
    for sequence in (short, middle):
        cache.write(sequence)
    single = Span(token_ids=[1], start=middle.num_tokens - 1, pages=middle.pages, by_token=True)
    batch, _ = build_batch([short.span(0, short.num_tokens), single], cache.pool, CPU)
    found = cache.attend(batch, torch.cat((middle.q_TQD[-1:], short.q_TQD)))
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], short.expected(), rtol=1e-4, atol=1e-4)


def test_scores_of_any_size_stay_finite(heads: tuple[int, int, int], sequences: list[Sequence]) -> None:
    cache, sequence = Cache(heads), sequences[-1]
    sequence.q_TQD *= 1e3
    cache.write(sequence)
    batch, _ = build_batch([sequence.span(0, sequence.num_tokens)], cache.pool, CPU)
    found = cache.attend(batch, sequence.q_TQD)
    torch.testing.assert_close(found, sequence.expected(), rtol=0.02, atol=0.02)
