"""The prefix cache never gives a wrong page, and never one that was given out to somebody else."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from model.pages import PagePool
from prefill.prefix_cache import PrefixCache

PAGE = 4


def compute(pool: PagePool, cache: PrefixCache, token_ids: list[int], content: dict[int, tuple[int, ...]]) -> list[int]:
    """What an engine does with a prompt; `content` is what each page holds: all tokens up to its end."""
    cached = cache.find(token_ids)
    pool.share(cached)
    rest = pool.allocate(pool.pages_for(len(token_ids)) - len(cached))
    assert rest is not None
    pages = [*cached, *rest]
    for number, page in enumerate(pages):
        if number < len(cached):
            assert content[page] == tuple(token_ids[: (number + 1) * PAGE]), "a hit is the prompt's own prefix"
        content[page] = tuple(token_ids[: (number + 1) * PAGE])
    cache.add(token_ids, pages)
    return pages


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=22), max_size=40), st.randoms())
def test_a_hit_is_never_wrong_whatever_is_evicted(prompts: list[list[int]], rng: random.Random) -> None:
    pool, content = PagePool(14, PAGE), dict[int, tuple[int, ...]]()
    cache = PrefixCache(pool)
    held: list[list[int]] = []
    for prompt in prompts:
        while pool.num_free < pool.pages_for(len(prompt)) or (held and rng.random() < 0.4):
            pool.release(held.pop(rng.randrange(len(held))))
        held.append(compute(pool, cache, prompt, content))
    for pages in held:
        pool.release(pages)
    assert pool.num_free == pool.num_pages


def test_in_a_long_history_every_hit_is_right_and_no_page_is_lost() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    pool, content = PagePool(14, PAGE), dict[int, tuple[int, ...]]()
    cache, held = PrefixCache(pool), list[list[int]]()
    for _ in range(1000):
        prompt = [rng.randrange(2) for _ in range(rng.randint(1, 22))]
        while pool.num_free < pool.pages_for(len(prompt)) or (held and rng.random() < 0.4):
            pool.release(held.pop(rng.randrange(len(held))))
        held.append(compute(pool, cache, prompt, content))
        assert len(cache) <= pool.num_pages
        assert pool.num_pages - pool.num_free == len({page for pages in held for page in pages})


def test_a_prompt_finds_its_own_full_pages_but_its_last_token() -> None:
    pool = PagePool(8, PAGE)
    cache, prompt = PrefixCache(pool), list(range(2 * PAGE))
    pages = compute(pool, cache, prompt, {})
    assert cache.find(prompt) == pages[:1]
    assert cache.find([*prompt, 99]) == pages


def test_a_prompt_that_differs_early_finds_nothing_behind_the_difference() -> None:
    pool = PagePool(8, PAGE)
    cache = PrefixCache(pool)
    compute(pool, cache, [1] * 12, {})
    assert cache.find([1, 1, 1, 2, *[1] * 8]) == []
    assert len(cache.find([*[1] * 7, 2, *[1] * 8])) == 1


def test_pages_that_are_held_survive_any_demand() -> None:
    pool, content = PagePool(4, PAGE), dict[int, tuple[int, ...]]()
    cache = PrefixCache(pool)
    held = compute(pool, cache, [7] * 8, content)
    for number in range(5):
        pool.release(compute(pool, cache, [number] * 8, content))
    assert cache.find([7] * 9) == held


def test_what_was_used_last_is_kept_longest() -> None:
    pool, content = PagePool(4, PAGE), dict[int, tuple[int, ...]]()
    cache = PrefixCache(pool)
    for token in (1, 2):
        pool.release(compute(pool, cache, [token] * 8, content))
    pool.release(compute(pool, cache, [1] * 8, content))
    pool.release(compute(pool, cache, [3] * 4, content))
    assert len(cache.find([1] * 9)) == 2
    assert len(cache.find([2] * 9)) < 2


def test_with_a_lookahead_a_page_is_known_by_the_token_after_it_too() -> None:
    pool = PagePool(16, 4)
    cache = PrefixCache(pool, lookahead=1)
    pages = pool.allocate(3) or []
    cache.add([1, 2, 3, 4, 5, 6, 7, 8, 9], pages)
    assert cache.find([1, 2, 3, 4, 5, 6, 7, 8, 9, 9]) == pages[:2]
    assert cache.find([1, 2, 3, 4, 5, 6, 7, 8, 0, 0]) == pages[:1]
    assert cache.find([1, 2, 3, 4, 0, 0, 0]) == []
    # What lies behind the last token is not known yet.
    whole = pool.allocate(1) or []
    cache.add([7, 7, 7, 7], whole)
    assert cache.find([7, 7, 7, 7, 7]) == []
    assert len(cache) == 2


def test_what_two_compute_at_once_is_known_by_the_page_of_the_first_and_both_can_go() -> None:
    pool, content = PagePool(4, PAGE), dict[int, tuple[int, ...]]()
    cache, prompt = PrefixCache(pool), [random.randrange(1000)] * PAGE
    first, second = (compute(pool, cache, prompt, content) for _ in range(2))
    assert first != second
    assert cache.find([*prompt, 0]) == first
    for pages in (second, first):
        pool.release(pages)
    assert pool.allocate(4) is not None
    assert (len(cache), cache.find([*prompt, 0])) == (0, [])


def test_a_prompt_that_comes_often_is_known_once() -> None:
    pool, content = PagePool(8, PAGE), dict[int, tuple[int, ...]]()
    cache, prompt = PrefixCache(pool), [random.randrange(1000) for _ in range(3 * PAGE + 1)]
    for _ in range(5):
        pool.release(compute(pool, cache, prompt, content))
        assert len(cache) == 3
    assert pool.allocate(8) is not None
    assert len(cache) == 0
