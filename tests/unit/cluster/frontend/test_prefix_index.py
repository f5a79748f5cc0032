from __future__ import annotations

import random

from cluster.frontend.prefix_index import PrefixIndex
from octet.ids import WorkerId

A, B = WorkerId("prefill-0"), WorkerId("prefill-1")


def test_a_worker_is_known_by_the_full_pages_it_was_sent() -> None:
    index, prompt = PrefixIndex([A, B], 4, 100), random.choices(range(1000), k=18)
    index.sent(A, prompt)
    index.sent(B, prompt[:9])
    assert index.cached_tokens([*prompt, 5]) == {A: 16, B: 8}


def test_only_the_common_beginning_counts() -> None:
    index = PrefixIndex([A], 4, 100)
    index.sent(A, [1] * 12)
    assert index.cached_tokens([1, 1, 1, 1, 2, *[1] * 11]) == {A: 4}
    assert index.cached_tokens([2, *[1] * 11]) == {A: 0}


def test_what_was_sent_least_recently_is_forgotten_first() -> None:
    index = PrefixIndex([A], 4, 2)
    index.sent(A, [1] * 4)
    index.sent(A, [2] * 4)
    index.sent(A, [1] * 4)
    index.sent(A, [3] * 4)
    assert [index.cached_tokens([token] * 4)[A] for token in (1, 2, 3)] == [4, 0, 4]


def test_without_a_cache_nothing_is_remembered() -> None:
    index = PrefixIndex([A], 4, 0)
    index.sent(A, [1] * 8)
    assert index.cached_tokens([1] * 8) == {A: 0}


def test_when_workers_change_those_that_stay_are_remembered() -> None:
    index = PrefixIndex([A], 4, 100)
    index.sent(A, [1] * 8)
    index.set_workers([A, B])
    assert index.cached_tokens([1] * 8) == {A: 8, B: 0}
    index.set_workers([B])
    assert index.cached_tokens([1] * 8) == {B: 0}


def test_a_page_is_known_behind_the_pages_that_it_was_sent_with_and_nowhere_else() -> None:
    index, pages = PrefixIndex([A], 4, 100), [random.choices(range(1000), k=4) for _ in range(3)]
    index.sent(A, [*pages[0], *pages[1]])
    assert index.cached_tokens([*pages[1], *pages[0]]) == {A: 0}
    assert index.cached_tokens([*pages[0], *pages[2], *pages[1]]) == {A: 4}
