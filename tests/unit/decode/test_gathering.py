from __future__ import annotations

from decode.gathering import Gathering
from octet.ids import WorkerId

NEAR, OTHER = WorkerId("prefill-0"), WorkerId("prefill-1")


def gathering(*following: int, longest_s: float = 1.0) -> Gathering:
    """Before the first step of a batch, after offers of a worker."""
    made = Gathering(longest_s)
    made.empty()
    for each in following:
        made.note(NEAR, each)
    return made


def test_nobody_waits_who_is_followed_by_nobody() -> None:
    assert not gathering(0).waits(0.0, num_arriving=3)


def test_the_first_wait_for_those_of_the_next_chunk_and_for_their_pages() -> None:
    made = gathering(2)
    assert made.waits(10.0, num_arriving=0)
    made.note(NEAR, 1)
    made.note(NEAR, 0)
    assert made.waits(10.3, num_arriving=2)
    assert made.waits(10.4, num_arriving=1)
    assert not made.waits(10.5, num_arriving=0)


def test_they_wait_so_long_and_no_longer() -> None:
    made = gathering(2, longest_s=0.5)
    assert made.waits(10.0, num_arriving=0)
    made.note(NEAR, 4)
    assert made.waits(10.4, num_arriving=0)
    assert not made.waits(10.5, num_arriving=0)


def test_a_batch_that_has_begun_waits_for_nobody() -> None:
    made = gathering(0)
    assert not made.waits(10.0, num_arriving=0)
    made.note(NEAR, 5)
    assert not made.waits(10.1, num_arriving=5)


def test_an_empty_batch_begins_anew() -> None:
    made = gathering(0)
    assert not made.waits(10.0, num_arriving=0)
    made.empty()
    made.note(NEAR, 1)
    assert made.waits(20.0, num_arriving=0)
    assert not made.waits(21.0, num_arriving=0)


def test_every_source_counts() -> None:
    made = gathering(1)
    made.note(OTHER, 1)
    made.note(NEAR, 0)
    assert made.waits(0.0, num_arriving=0)
    made.note(OTHER, 0)
    assert not made.waits(0.1, num_arriving=0)


def test_who_may_not_come_is_not_waited_for() -> None:
    made = gathering(2)
    assert made.waits(0.0, num_arriving=1)
    made.forget()
    assert not made.waits(0.1, num_arriving=1)


def test_a_source_that_never_came_is_not_waited_for_again() -> None:
    made = gathering(3)
    assert made.waits(0.0, num_arriving=0)
    assert not made.waits(1.0, num_arriving=0)
    made.empty()
    made.note(OTHER, 1)
    made.note(OTHER, 0)
    assert not made.waits(5.0, num_arriving=0)


def test_with_no_time_to_wait_nobody_does() -> None:
    assert not gathering(7, longest_s=0.0).waits(0.0, num_arriving=7)
