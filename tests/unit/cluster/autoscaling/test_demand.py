"""Which signals ask for which members, told by single decisions."""

from __future__ import annotations

import pytest

from tests.unit.cluster.scaling import experts, member, of, once, pool, scaling, signals


def test_shards_grow_for_prompts_that_wait_and_not_only_for_those_computed() -> None:
    """Prefill computes 350 tokens/s, twice as many arrive: the shards will be asked for more, too."""
    decode = pool(member(kv=0.8, ongoing=7, tokens_per_s=100))
    for of_decode, wanted in ((0.0, 5), (1.0, 4)):
        shards = experts(*(member(n, busy=0.7) for n in range(4)), of_decode=of_decode)
        assert of(once(signals(decode=decode, shards=shards, arriving=700), scaling()), "experts").target == wanted


def test_few_shards_have_a_larger_part_in_reserve_than_many() -> None:
    reserve = []
    for num in (4, 64):
        # Decode is at the pace that shards are sized for.
        decode = pool(member(kv=0.8, ongoing=7, tokens_per_s=100))
        shards = experts(*(member(n, busy=0.6) for n in range(num)), of_decode=1.0)
        config = scaling(experts={"max_replicas": 100, "square_root_staffing": 2}, tolerance=0)
        reserve.append(of(once(signals(decode=decode, shards=shards), config), "experts").target / (0.6 * num))
    assert reserve[0] > 2 > 1.5 > reserve[1] > 1 / 0.7


@pytest.mark.parametrize("slow", [2, 5, 20])
def test_steps_that_take_ever_longer_ask_for_no_more_than_a_quarter_more_shards(slow: int) -> None:
    """Shards that are a little too few make steps several times as long."""
    decode = pool(member(kv=0.8, ongoing=7, tokens_per_s=100 / slow))
    shards = experts(*(member(n, busy=0.7) for n in range(4)), of_decode=1.0)
    assert of(once(signals(decode=decode, shards=shards), scaling()), "experts").target == 5


def test_decode_workers_are_counted_for_the_pace_that_shards_are_sized_for() -> None:
    """As many tokens come from workers that hold half of the pages, when shards are twice as fast."""
    targets = []
    for kv, ongoing in ((0.4, 4), (0.8, 8)):
        # 8 sequences at 0.07 s per token, or 4 at 0.035 s.
        decode = pool(*(member(n, kv=kv, ongoing=ongoing, tokens_per_s=8 / 0.07) for n in range(8)), wait=1.0)
        targets.append(of(once(signals(decode=decode), scaling()), "decode").target)
    assert targets == [8, 8]


def test_imbalance_asks_for_replicas_and_not_for_shards() -> None:
    shards = experts(*(member(n, busy=0.6) for n in range(4)), level=0.55, prospects=((0, 0.56), (4, 0.97)))
    decision = once(signals(shards=shards), scaling())
    assert of(decision, "redundant_experts").target == 4
    assert not of(decision, "experts").acts


def test_load_asks_for_shards_and_not_for_replicas() -> None:
    shards = experts(*(member(n, busy=0.95) for n in range(4)), level=0.98, prospects=((0, 0.98), (4, 0.99)))
    decision = once(signals(shards=shards), scaling())
    assert of(decision, "experts").target > 4
    assert not of(decision, "redundant_experts").acts


def test_slots_go_back_when_redundancy_no_longer_pays() -> None:
    shards = experts(
        *(member(n, busy=0.66) for n in range(4)),
        level=0.97,
        redundant=8,
        prospects=((0, 0.968), (4, 0.97), (8, 0.971)),
    )
    decision = once(signals(shards=shards), scaling())
    assert of(decision, "redundant_experts").target == 0
    assert "pay" in of(decision, "redundant_experts").reason


def test_redundancy_never_outgrows_the_shards() -> None:
    shards = experts(*(member(n, busy=0.5) for n in range(2)), level=0.5, prospects=((0, 0.5), (16, 0.97)), fit=16)
    assert of(once(signals(shards=shards), scaling()), "redundant_experts").target == 0


def test_a_slow_answer_grows_the_pool_that_is_slow() -> None:
    decision = once(signals(decode=pool(member(kv=0.5, ongoing=5), slo=1.3, wait=0.1)), scaling())
    assert of(decision, "decode").acts
    assert not of(decision, "experts").acts


def test_a_slow_answer_that_waits_for_experts_grows_the_shards() -> None:
    slow = signals(
        decode=pool(member(kv=0.8, ongoing=8, tokens_per_s=80), slo=1.3, wait=0.8),
        shards=experts(*(member(n, busy=0.6) for n in range(4))),
    )
    decision = once(slow, scaling())
    assert not of(decision, "decode").acts
    assert of(decision, "experts").target > 4


def test_decode_that_steps_faster_than_it_has_to_asks_for_no_shards() -> None:
    """Decode workers step as fast as shards let them; slower shards would do."""
    busy = experts(*(member(n, busy=0.95) for n in range(4)), of_decode=0.9)
    fast = signals(decode=pool(member(kv=0.8, ongoing=8, tokens_per_s=400)), shards=busy)
    just_so = signals(decode=pool(member(kv=0.8, ongoing=8, tokens_per_s=90)), shards=busy)
    assert of(once(fast, scaling()), "experts").target < 4
    assert of(once(just_so, scaling()), "experts").target > 4


def test_sequences_that_wait_for_a_place_in_a_batch_ask_for_decode_workers() -> None:
    """Of 64 places each, of which 0.8 are meant to be taken."""
    for waiting, wanted in ((0, 1), (51, 2), (102, 3)):
        decode = pool(member(kv=0.01, ongoing=51, waiting=waiting))
        assert of(once(signals(decode=decode), scaling()), "decode").target == wanted
