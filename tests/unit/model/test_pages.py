from __future__ import annotations

import random

import pytest

from model.pages import PagePool


def allocated(pool: PagePool, count: int) -> list[int]:
    pages = pool.allocate(count)
    assert pages is not None
    return pages


@pytest.mark.parametrize(("num_tokens", "pages"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_tokens_take_whole_pages(num_tokens: int, pages: int) -> None:
    assert PagePool(8, 16).pages_for(num_tokens) == pages


def test_no_page_is_given_out_twice() -> None:
    pool = PagePool(8, 16)
    assert sorted(allocated(pool, 3) + allocated(pool, 5)) == list(range(8))


def test_an_allocation_that_does_not_fit_takes_nothing() -> None:
    pool = PagePool(8, 16)
    allocated(pool, 5)
    assert pool.allocate(4) is None
    assert pool.num_free == 3


def test_released_pages_can_be_allocated_again() -> None:
    pool = PagePool(4, 16)
    pool.release(allocated(pool, 4))
    assert sorted(allocated(pool, 4)) == [0, 1, 2, 3]


def test_a_shared_page_is_free_only_when_its_last_holder_releases_it() -> None:
    pool = PagePool(1, 16)
    page = allocated(pool, 1)
    pool.share(page)
    pool.release(page)
    assert pool.num_free == 0
    pool.release(page)
    assert pool.num_free == 1


def test_a_free_page_cannot_be_released() -> None:
    pool = PagePool(2, 16)
    with pytest.raises(AssertionError, match="released"):
        pool.release([0])


def test_a_free_page_cannot_be_shared() -> None:
    pool = PagePool(2, 16)
    with pytest.raises(AssertionError, match="shared"):
        pool.share([0])


def test_slots_follow_the_page_table() -> None:
    assert PagePool(8, 4).slots([5, 2, 7], 3, 9) == [23, 8, 9, 10, 11, 28]


def test_free_pages_are_those_that_nobody_holds_after_any_history() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool, held = PagePool(20, 4), list[list[int]]()
    for _ in range(500):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        elif held and rng.random() < 0.3:
            shared = rng.choice(held)
            pool.share(shared)
            held.append(shared)
        elif (pages := pool.allocate(rng.randint(0, 6))) is not None:
            assert not {page for table in held for page in table} & set(pages)
            held.append(pages)
        assert pool.num_free == 20 - len({page for table in held for page in table})


def test_a_kept_page_is_free_and_can_be_taken_back() -> None:
    pool = PagePool(2, 16)
    page = allocated(pool, 1)
    pool.keep(page[0], lambda page: None)
    pool.release(page)
    assert pool.num_free == 2
    pool.share(page)
    assert pool.num_free == 1


def test_a_kept_page_is_not_held_until_somebody_takes_it_back() -> None:
    pool = PagePool(3, 16)
    pages = allocated(pool, 2)
    pool.keep(pages[0], lambda page: None)
    assert pool.num_held(pages) == 2
    pool.release(pages[:1])
    assert pool.num_held(pages) == 1
    pool.share(pages[:1])
    assert pool.num_held(pages) == 2


def test_kept_pages_are_given_out_last_and_their_keeper_is_told() -> None:
    pool, forgotten = PagePool(3, 16), list[int]()
    pages = allocated(pool, 3)
    for page in pages[:2]:
        pool.keep(page, forgotten.append)
    pool.release(pages)
    assert allocated(pool, 1) == pages[2:]
    assert forgotten == []
    assert sorted(allocated(pool, 2)) == sorted(pages[:2])
    assert sorted(forgotten) == sorted(pages[:2])


def test_of_kept_pages_the_first_released_goes_first_and_a_table_from_its_end() -> None:
    pool, forgotten = PagePool(4, 16), list[int]()
    early, late = allocated(pool, 2), allocated(pool, 2)
    for page in (*early, *late):
        pool.keep(page, forgotten.append)
    pool.release(early)
    pool.release(late)
    allocated(pool, 4)
    assert forgotten == [early[1], early[0], late[1], late[0]]


def test_a_page_that_is_taken_back_is_not_given_out() -> None:
    pool = PagePool(2, 16)
    pages = allocated(pool, 2)
    for page in pages:
        pool.keep(page, lambda page: None)
    pool.release(pages)
    pool.share(pages[:1])
    assert pool.allocate(2) is None
    assert allocated(pool, 1) == pages[1:]


def test_the_keeper_of_a_page_is_told_once_and_not_of_what_others_do_with_it() -> None:
    pool, forgotten = PagePool(1, 16), list[int]()
    page = allocated(pool, 1)
    pool.keep(page[0], forgotten.append)
    pool.release(page)
    for _ in range(3):
        assert allocated(pool, 1) == page
        pool.release(page)
    assert forgotten == page
