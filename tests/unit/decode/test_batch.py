from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.admission import peak_pages
from decode.batch import DecodeBatch, Incoming
from model.pages import PagePool
from octet.ids import LeaseId, RequestId, WorkerId
from octet.messages import KvOffer, PrefillRequest, pack_ids
from octet.request import Output, Sampling, Stopping

PAGE = 4


def offer(
    num_tokens: int,
    *choices: int,
    name: str = "r",
    arrival_s: float = 0.0,
    priority: int = 0,
    max_new_tokens: int = 1,
) -> KvOffer:
    request = PrefillRequest(
        request_id=RequestId(name),
        attempt=0,
        choices=choices or (0,),
        token_ids=pack_ids(range(num_tokens)),
        num_prompt_tokens=num_tokens,
        sampling=Sampling(),
        stopping=Stopping(max_new_tokens=max_new_tokens),
        output=Output(),
        priority=priority,
        arrival_s=arrival_s,
        decode_worker=WorkerId("decode-0"),
        frontend=WorkerId("frontend-0"),
    )
    return KvOffer(
        lease_id=LeaseId(name),
        source=WorkerId("prefill-0"),
        request=request,
        next_tokens=tuple(50 + choice for choice in request.choices),
        lease_s=60.0,
    )


def land(batch: DecodeBatch, offered: KvOffer, num_tokens: int, *dropped: int) -> list[tuple[int, int]]:
    pages = batch.reserve(offered, [])
    assert pages is not None
    return batch.admit(Incoming(offer=offered, token_ids=list(range(num_tokens)), pages=pages, dropped=set(dropped)))


def names(batch: DecodeBatch) -> list[str]:
    return [sequence.request.request_id for sequence in batch.running]


@pytest.mark.parametrize(("attempt", "found"), [(None, [0, 1]), (0, [0, 1]), (1, [])])
def test_sequences_are_found_by_attempt(attempt: int | None, found: list[int]) -> None:
    batch = DecodeBatch(PagePool(16, PAGE), 16)
    land(batch, offer(3, 0, 1, name="a"), 3)
    assert [sequence.choice for sequence in batch.of(RequestId("a"), attempt=attempt)] == found


@given(st.integers(1, 30), st.integers(1, 6))
def test_choices_share_full_pages_and_have_the_last_partial_one_for_themselves(num_tokens: int, n: int) -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 64)
    copies = land(batch, offer(num_tokens, *range(n)), num_tokens)
    full, partial = divmod(num_tokens, PAGE)
    tables = [sequence.pages for sequence in batch.running]
    assert all(table[:full] == tables[0][:full] for table in tables)
    own = [table[full] for table in tables if partial]
    assert len(set(own)) == len(own)
    assert copies == [(own[0], page) for page in own[1:]]
    assert pool.num_pages - pool.num_free == full + (n if partial else 0)


@given(st.integers(1, 30), st.sets(st.integers(0, 4)))
def test_every_page_is_free_again_when_every_sequence_has_left(num_tokens: int, dropped: set[int]) -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 64)
    land(batch, offer(num_tokens, *range(5)), num_tokens, *dropped)
    assert [sequence.choice for sequence in batch.running] == [c for c in range(5) if c not in dropped]
    for sequence in list(batch.running):
        batch.remove(sequence)
    assert pool.num_free == pool.num_pages


def test_the_first_wanted_choice_keeps_the_page_that_arrived() -> None:
    batch = DecodeBatch(PagePool(16, PAGE), 16)
    offered = offer(6, 0, 1, 2)
    pages = batch.reserve(offered, [])
    assert pages is not None
    copies = batch.admit(Incoming(offer=offered, token_ids=list(range(6)), pages=pages, dropped={0}))
    assert [sequence.pages for sequence in batch.running] == [[pages[0], pages[1]], [pages[0], pages[2]]]
    assert copies == [(pages[1], pages[2])]


def test_each_choice_goes_on_from_its_own_first_token() -> None:
    batch = DecodeBatch(PagePool(16, PAGE), 16)
    land(batch, offer(3, 0, 2), 3)
    assert [sequence.token_ids for sequence in batch.running] == [[0, 1, 2, 50], [0, 1, 2, 52]]


def test_the_first_token_counts_as_new() -> None:
    batch = DecodeBatch(PagePool(16, PAGE), 16)
    land(batch, offer(3), 3)
    assert batch.running[0].num_new_tokens == 1


def test_running_sequences_are_in_order_of_priority_then_arrival() -> None:
    batch = DecodeBatch(PagePool(32, PAGE), 16)
    land(batch, offer(1, name="late", arrival_s=2), 1)
    land(batch, offer(1, name="urgent", arrival_s=3, priority=-1), 1)
    land(batch, offer(1, name="early", arrival_s=1), 1)
    assert names(batch) == ["urgent", "early", "late"]


def test_an_offer_waits_while_the_batch_is_full() -> None:
    batch = DecodeBatch(PagePool(32, PAGE), 3)
    land(batch, offer(1, 0, 1, name="a"), 1)
    assert batch.reserve(offer(1, 0, 1, name="b"), []) is None
    on_its_way = Incoming(offer=offer(1, name="c"), token_ids=[0], pages=[])
    assert batch.reserve(offer(1, name="b"), [on_its_way]) is None
    assert batch.reserve(offer(1, name="b"), []) is not None


def test_an_offer_waits_until_there_are_pages_for_all_that_will_be_held() -> None:
    """Two are expected to hold 3 pages each when they end, half of 16 tokens behind 4; a third would need as many."""
    pool = PagePool(8, PAGE)
    batch = DecodeBatch(pool, 16)
    for name in "ab":
        land(batch, offer(4, name=name, max_new_tokens=16), 4)
    assert pool.num_free == 6
    assert batch.reserve(offer(4, name="c", max_new_tokens=16), []) is None
    assert batch.reserve(offer(4, name="c", max_new_tokens=1), []) is not None


def test_what_is_on_its_way_counts_as_if_it_ran() -> None:
    batch = DecodeBatch(PagePool(8, PAGE), 16)
    first, second = (offer(4, name=name, max_new_tokens=16) for name in "ab")
    incoming = [
        Incoming(offer=each, token_ids=[0] * 4, pages=batch.reserve(each, []) or []) for each in (first, second)
    ]
    assert batch.reserve(offer(4, name="c", max_new_tokens=16), incoming) is None


def test_answers_that_ended_early_let_more_in() -> None:
    batch = DecodeBatch(PagePool(8, PAGE), 16)
    for number in range(8):
        land(batch, offer(4, name=f"short-{number}", max_new_tokens=16), 4)
        batch.running[0].token_ids.append(0)
        batch.remove(batch.running[0])
    for number in range(4):
        land(batch, offer(4, name=str(number), max_new_tokens=16), 4)
    assert len(batch.running) == 4


def test_an_offer_to_an_idle_worker_may_take_every_page() -> None:
    batch = DecodeBatch(PagePool(3, PAGE), 16)
    assert batch.reserve(offer(12, max_new_tokens=100), []) is not None


def test_a_sequence_gets_a_page_only_when_its_last_one_is_full() -> None:
    pool = PagePool(8, PAGE)
    batch = DecodeBatch(pool, 16)
    land(batch, offer(3), 3)
    for length in range(4, 10):
        assert batch.grow() == []
        assert len(batch.running[0].pages) == pool.pages_for(length)
        batch.running[0].token_ids.append(0)


def test_the_youngest_gives_way_when_pages_run_out() -> None:
    batch = DecodeBatch(PagePool(5, PAGE), 16)
    for number, name in enumerate(["oldest", "middle", "youngest"]):
        land(batch, offer(3, name=name, arrival_s=number), 3)
    for sequence in batch.running:
        sequence.token_ids.append(0)
    assert [sequence.request.request_id for sequence in batch.grow()] == ["youngest"]
    assert names(batch) == ["oldest", "middle"]


def test_an_evicted_sequences_pages_serve_those_who_stay() -> None:
    pool = PagePool(4, PAGE)
    batch = DecodeBatch(pool, 16)
    land(batch, offer(3, name="oldest"), 3)
    land(batch, offer(3, name="youngest", arrival_s=1), 3)
    batch.running[0].token_ids += [0] * 12
    for _ in range(2):
        batch.grow()
    assert names(batch) == ["oldest"]
    assert (len(batch.running[0].pages), pool.num_free) == (4, 0)


def test_a_sequence_that_needs_more_than_every_page_is_evicted_itself() -> None:
    pool = PagePool(2, PAGE)
    batch = DecodeBatch(pool, 16)
    land(batch, offer(8), 8)
    assert [sequence.choice for sequence in batch.grow()] == [0]
    assert pool.num_free == 2


@pytest.mark.parametrize(("choice", "found"), [(None, [0, 1]), (1, [1]), (7, [])])
def test_sequences_are_found_by_request_and_choice(choice: int | None, found: list[int]) -> None:
    batch = DecodeBatch(PagePool(16, PAGE), 16)
    land(batch, offer(3, 0, 1, name="a"), 3)
    land(batch, offer(3, 0, name="b"), 3)
    assert [sequence.choice for sequence in batch.of(RequestId("a"), choice)] == found


@given(st.integers(1, 30), st.integers(1, 6))
def test_with_an_mtp_layer_choices_do_not_share_the_last_page(num_tokens: int, n: int) -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 64, lookahead=1)
    copies = land(batch, offer(num_tokens, *range(n)), num_tokens)
    shared = (num_tokens - 1) // PAGE
    tables = [sequence.pages for sequence in batch.running]
    assert all(table[:shared] == tables[0][:shared] for table in tables)
    assert len({table[shared] for table in tables}) == n
    assert len(copies) == n - 1
    assert pool.num_pages - pool.num_free == shared + n


def test_drafts_get_the_room_there_is_and_give_it_back() -> None:
    pool = PagePool(4, PAGE)
    batch = DecodeBatch(pool, 16)
    land(batch, offer(3, name="a"), 3)
    land(batch, offer(3, name="b"), 3)
    first, second = batch.running
    assert (batch.make_room(first, 5), len(first.pages)) == (5, 3)
    assert (batch.make_room(second, 5), len(second.pages)) == (0, 1)
    batch.trim()
    assert [len(sequence.pages) for sequence in batch.running] == [1, 1]
    assert pool.num_free == 2


@given(st.integers(1, 30), st.integers(0, 9), st.integers(0, 4))
def test_fewer_drafts_are_made_where_there_are_pages_for_some_of_them(
    num_tokens: int, count: int, num_free: int
) -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 16)
    land(batch, offer(num_tokens), num_tokens)
    assert batch.grow() == []
    assert pool.allocate(pool.num_free - num_free) is not None
    (sequence,) = batch.running
    room = (len(sequence.pages) + num_free) * PAGE - len(sequence.token_ids)
    assert batch.make_room(sequence, count) == min(count, room)
    assert len(sequence.pages) >= pool.pages_for(len(sequence.token_ids) + min(count, room))
    batch.trim()
    # The next token's own page stays: another sequence may take what is free before the next step.
    assert len(sequence.pages) == pool.pages_for(len(sequence.token_ids))
    assert pool.allocate(pool.num_free) is not None
    assert batch.grow() == []


def test_admission_counts_the_last_pages_that_choices_with_drafts_do_not_share() -> None:
    needed = []
    for lookahead in (0, 1):
        batch = DecodeBatch(PagePool(256, PAGE), 64, lookahead=lookahead)
        land(batch, offer(8, *range(6)), 8)
        needed.append(peak_pages(list(batch._demands([])), PAGE))
    assert needed[1] - needed[0] == 5


@given(st.integers(1, 30), st.integers(0, 9))
def test_a_sequence_that_is_given_away_takes_the_pages_that_hold_its_kv_and_no_more(
    num_tokens: int, num_new: int
) -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 64)
    land(batch, offer(num_tokens, 0), num_tokens)
    (sequence,) = batch.running
    for _ in range(num_new):
        assert batch.grow() == []
        sequence.token_ids.append(1)
    batch.grow()
    batch.detach(sequence)
    # The last token is the next step's input, and has no KV yet.
    assert len(sequence.pages) == pool.pages_for(num_tokens + num_new)
    assert batch.running == []
    assert pool.num_pages - pool.num_free == len(sequence.pages)


def test_every_choice_on_its_way_takes_a_place() -> None:
    batch = DecodeBatch(PagePool(32, PAGE), 3)
    on_its_way = Incoming(offer=offer(1, 0, 1, name="a"), token_ids=[0], pages=[])
    assert batch.reserve(offer(1, 0, 1, name="b"), [on_its_way]) is None
    assert batch.reserve(offer(1, name="b"), [on_its_way]) is not None


def test_where_answers_are_as_long_as_they_may_be_all_that_is_left_is_expected() -> None:
    pool, most = PagePool(64, PAGE), 16
    batch = DecodeBatch(pool, 16)
    for number in range(8):
        land(batch, offer(4, name=f"long-{number}", max_new_tokens=most), 4)
        batch.running[0].token_ids += [0] * (most - 1)
        batch.remove(batch.running[0])
    land(batch, offer(4, max_new_tokens=most), 4)
    (sequence,) = batch.running
    for _ in range(most - 2):
        (demand,) = batch._demands([])
        assert demand.remaining == sequence.num_left
        sequence.token_ids.append(0)


def test_every_choice_of_an_offer_is_expected_to_grow() -> None:
    """Half of 16 tokens behind 4 are expected of each: 3 pages, of which those of one request share the first."""
    batch = DecodeBatch(PagePool(10, PAGE), 16)
    land(batch, offer(4, name="a", max_new_tokens=16), 4)
    assert batch.reserve(offer(4, 0, 1, 2, 3, name="b", max_new_tokens=16), []) is None
    assert batch.reserve(offer(4, 0, name="b", max_new_tokens=16), []) is not None


def test_choices_that_were_computed_again_apart_share_no_page() -> None:
    pool = PagePool(64, PAGE)
    batch = DecodeBatch(pool, 16)
    for choice in range(3):
        land(batch, offer(12, choice, name="same"), 12)
    batch.grow()
    assert peak_pages([*batch._demands([])], PAGE) == pool.num_pages - pool.num_free == 12


def test_who_gave_way_tells_nothing_of_how_long_answers_get() -> None:
    batch = DecodeBatch(PagePool(2, PAGE), 16)
    for _ in range(8):
        land(batch, offer(8, max_new_tokens=100), 8)
        assert len(batch.grow()) == 1
    land(batch, offer(4, max_new_tokens=100), 4)
    (demand,) = batch._demands([])
    assert demand.remaining == round(101 / 2) - 1
