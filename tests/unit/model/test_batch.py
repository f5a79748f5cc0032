from __future__ import annotations

import dataclasses

import torch

from model.batch import Batch, Span, Wanted, build_batch, halve
from model.pages import PagePool

POOL = PagePool(16, 4)
LONG = Span(token_ids=[10, 11, 12, 13, 14], start=0, pages=[3, 1])
SINGLE = Span(token_ids=[20], start=6, pages=[5, 7], by_token=True)
LATER = Span(token_ids=[30, 31], start=3, pages=[2, 9])
OTHER_SINGLE = Span(token_ids=[40], start=0, pages=[8, 4], by_token=True)


def built(*spans: Span) -> tuple[Batch, list[slice]]:
    return build_batch(spans, POOL, torch.device("cpu"))


def test_spans_that_attend_by_token_come_first() -> None:
    batch, _ = built(LONG, SINGLE, LATER, OTHER_SINGLE)
    assert batch.token_ids_T.tolist() == [20, 40, 10, 11, 12, 13, 14, 30, 31]


def test_rows_are_in_the_order_of_the_spans() -> None:
    batch, rows = built(LONG, SINGLE, LATER, OTHER_SINGLE)
    assert [batch.token_ids_T[span_rows].tolist() for span_rows in rows] == [LONG.token_ids, [20], [30, 31], [40]]


def test_only_last_tokens_are_wanted_where_no_span_is_wanted_as_a_whole() -> None:
    spans = [dataclasses.replace(span, wanted="last") for span in (LONG, SINGLE, LATER)]
    unwanted = dataclasses.replace(OTHER_SINGLE, wanted="none")
    batch, rows = built(*spans[:2], unwanted, spans[2])
    assert batch.wanted is not None
    assert batch.wanted.decode is not None
    wanted = batch.token_ids_T[batch.wanted.rows_W]
    assert [wanted[span_rows].tolist() for span_rows in rows] == [[14], [20], [], [31]]
    assert batch.wanted.decode.lengths_B.tolist() == [5, 7, 5]
    assert batch.wanted.decode.pages_BP.tolist() == [[3, 1], [5, 7], [2, 9]]


def test_nothing_may_be_wanted() -> None:
    batch, rows = built(dataclasses.replace(LONG, wanted="none"))
    assert batch.wanted is not None
    assert (batch.wanted.rows_W.tolist(), batch.wanted.decode, rows) == ([], None, [slice(0, 0)])


def test_a_whole_span_makes_all_rows_wanted() -> None:
    batch, rows = built(dataclasses.replace(LATER, wanted="last"), LONG, dataclasses.replace(SINGLE, wanted="none"))
    assert batch.wanted is None
    assert [batch.token_ids_T[span_rows].tolist() for span_rows in rows] == [[30, 31], LONG.token_ids, [20]]


def test_positions_count_from_the_start_of_each_span() -> None:
    batch, _ = built(LONG, SINGLE, LATER)
    assert batch.positions_T.tolist() == [6, 0, 1, 2, 3, 4, 3, 4]


def test_each_token_writes_the_slot_of_its_position_in_its_own_pages() -> None:
    batch, _ = built(LONG, SINGLE, LATER)
    assert batch.kv_slots_T.tolist() == [30, 12, 13, 14, 15, 4, 11, 36]


def test_a_later_span_reads_the_pages_of_what_lies_before_it() -> None:
    batch, _ = built(SINGLE, LATER, Span(token_ids=[1, 2], start=4, pages=[2, 9]))
    assert [(span.start, span.pages.tolist()) for span in batch.prefill] == [(3, [2]), (4, [2])]


def test_the_rows_of_a_long_span_are_its_own() -> None:
    batch, _ = built(LONG, SINGLE, LATER)
    assert [batch.token_ids_T[span.rows].tolist() for span in batch.prefill] == [[10, 11, 12, 13, 14], [30, 31]]


def test_nothing_lies_before_a_span_from_the_start() -> None:
    batch, _ = built(LONG)
    assert (batch.prefill[0].start, batch.prefill[0].pages.tolist()) == (0, [])


def test_decode_rows_see_only_positions_that_exist() -> None:
    batch, _ = built(SINGLE, OTHER_SINGLE)
    assert batch.decode is not None
    assert batch.decode.mask_BL(4).tolist() == [[True] * 7 + [False], [True] + [False] * 7]


def test_decode_page_tables_are_as_wide_as_the_longest_sequence_needs() -> None:
    """A sequence may hold more pages than it has tokens for, or fewer than the longest."""
    many = Span(token_ids=[1], start=0, pages=[6, 2, 3, 4], by_token=True)
    few = Span(token_ids=[1], start=2, pages=[11], by_token=True)
    batch, _ = built(SINGLE, many, few)
    assert batch.decode is not None
    assert batch.decode.pages_BP.tolist() == [[5, 7], [6, 2], [11, 0]]


def test_a_token_that_begins_a_page_attends_to_itself() -> None:
    batch, _ = built(Span(token_ids=[1], start=4, pages=[5, 7], by_token=True))
    assert batch.decode is not None
    assert (batch.decode.pages_BP.tolist(), batch.decode.lengths_B.tolist()) == ([[5, 7]], [5])


def test_prompts_alone_have_no_decode_part() -> None:
    batch, _ = built(LONG, LATER)
    assert batch.decode is None


def test_a_prompts_single_token_attends_as_prompts_do() -> None:
    """Its bits are then those that it has in a longer chunk."""
    batch, rows = built(LATER, dataclasses.replace(SINGLE, by_token=False))
    assert batch.decode is None
    assert [span.rows for span in batch.prefill] == rows == [slice(0, 2), slice(2, 3)]


def test_halves_have_equally_many_tokens_and_keep_every_token_in_place() -> None:
    for spans in ([LONG], [LONG, SINGLE], [SINGLE, OTHER_SINGLE, LATER], [SINGLE, LONG, LATER]):
        first, second = halve(spans)
        sizes = [sum(len(span.token_ids) for span in half) for half in (first, second)]
        assert sizes[0] - sizes[1] in (0, 1)
        placed = {
            (tuple(span.pages), span.start + offset, token)
            for span in (*first, *second)
            for offset, token in enumerate(span.token_ids)
        }
        assert placed == {
            (tuple(span.pages), span.start + offset, token)
            for span in spans
            for offset, token in enumerate(span.token_ids)
        }


def test_the_last_token_of_a_cut_span_is_wanted_in_the_second_half() -> None:
    halves: tuple[tuple[Wanted, Wanted], ...] = (("all", "all"), ("last", "none"), ("none", "none"))
    for wanted, of_first in halves:
        (first,), (second,) = halve([dataclasses.replace(LONG, wanted=wanted)])
        assert (first.wanted, second.wanted) == (of_first, wanted)


def test_the_end_of_a_cut_span_comes_in_the_second_half() -> None:
    first, second = halve([LONG])
    assert (first[0].start, first[0].stop, second[0].start, second[0].stop) == (0, 3, 3, 5)
