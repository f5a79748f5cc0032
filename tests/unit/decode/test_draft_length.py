from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from decode.draft_length import DraftLength

MOST = 4


def run(
    policy: DraftLength, num_steps: int, acceptance: float, cost: Callable[[int], float], num_sequences: int = 8
) -> list[int]:
    """The lengths chosen in a world where each draft is right with this probability and a step takes this long."""
    rng, chosen = random.Random(5), []
    for _ in range(num_steps):
        length = policy.choose(num_sequences)
        chosen.append(length)
        tested = accepted = 0
        for _ in range(num_sequences):
            for _ in range(length):
                tested += 1
                if rng.random() >= acceptance:
                    break
                accepted += 1
        policy.observe(num_sequences, length, tested=tested, accepted=accepted, step_s=cost(length))
    return chosen


def share(chosen: list[int], length: int) -> float:
    return chosen.count(length) / len(chosen)


def test_every_length_is_tried_first() -> None:
    assert set(run(DraftLength(MOST), 2 * (MOST + 1), 0.5, lambda _: 1.0)) == set(range(MOST + 1))


def test_right_drafts_that_cost_nothing_are_made_as_often_as_possible() -> None:
    assert share(run(DraftLength(MOST), 300, 0.9, lambda _: 1.0)[100:], MOST) > 0.9


def test_wrong_drafts_are_not_made() -> None:
    assert share(run(DraftLength(MOST), 600, 0.02, lambda k: 1 + 0.2 * k)[200:], 0) > 0.9


def test_right_drafts_that_cost_too_much_are_not_made() -> None:
    assert share(run(DraftLength(MOST), 600, 0.7, lambda k: 1 + 0.9 * k)[200:], 0) > 0.9


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8])
def test_the_length_with_most_tokens_per_second_is_found(acceptance: float) -> None:
    def cost(length: int) -> float:
        return 1 + 0.15 * length

    rates = [sum(acceptance**i for i in range(k + 1)) / cost(k) for k in range(MOST + 1)]
    chosen = run(DraftLength(MOST), 1000, acceptance, cost)[200:]
    usual = max(set(chosen), key=chosen.count)
    assert rates[usual] > 0.95 * max(rates)


def test_when_drafts_become_right_they_are_made_again() -> None:
    policy = DraftLength(MOST)
    assert run(policy, 300, 0.0, lambda k: 1 + 0.2 * k)[-1] == 0
    assert share(run(policy, 2000, 0.95, lambda k: 1 + 0.2 * k)[-200:], MOST) > 0.8


def test_a_step_that_was_held_up_changes_nothing() -> None:
    policy = DraftLength(MOST)
    run(policy, 200, 0.9, lambda _: 1.0)
    before = policy.choose(8)
    policy.observe(8, before, tested=8, accepted=7, step_s=100.0)
    assert policy.choose(8) == before


def test_batch_sizes_are_learnt_apart() -> None:
    policy = DraftLength(MOST)
    run(policy, 400, 0.6, lambda k: 1 + 0.05 * k, num_sequences=1)
    run(policy, 400, 0.6, lambda k: 1 + 2.0 * k, num_sequences=32)
    assert (policy.choose(1) > 0, policy.choose(32)) == (True, 0)


def test_a_gain_that_is_no_more_than_noise_changes_nothing() -> None:
    assert share(run(DraftLength(1), 600, 0.0, lambda k: 1 + 0.015 * k)[200:], 1) > 0.9


def test_a_gain_over_any_length_that_is_no_more_than_noise_changes_nothing() -> None:
    policy = DraftLength(2)
    assert share(run(policy, 300, 0.0, lambda k: 1 + k)[100:], 0) > 0.9
    assert share(run(policy, 600, 0.0, lambda k: [1.0, 1.0, 3.0][k])[300:], 0) > 0.9


def test_what_steps_took_long_ago_is_forgotten() -> None:
    """Of 2000 steps without drafts; now, as answers have become longer, those take as long as any."""
    policy = DraftLength(MOST)
    assert share(run(policy, 2000, 0.7, lambda k: 1 + 0.9 * k)[200:], 0) > 0.9
    assert share(run(policy, 200, 0.7, lambda k: 5.0)[100:], 0) < 0.1


def test_the_lengths_on_both_sides_of_the_best_are_tried_again_now_and_then() -> None:
    def cost(length: int) -> float:
        return {0: 1.0, 1: 1.0, 2: 1.0, 3: 9.0, 4: 9.0}[length]

    late = run(DraftLength(MOST), 1000, 0.9, cost)[500:]
    assert share(late, 2) > 0.9
    assert {1, 2, 3} == set(late)


def test_at_either_end_the_only_neighbour_is_tried_as_often() -> None:
    chosen = run(DraftLength(MOST), 64 * 10, 0.0, lambda k: 1 + k)[64 * 5 :]
    assert 9 <= chosen.count(1) <= 11
    assert chosen.count(0) + chosen.count(1) == len(chosen)


def learnt(policy: DraftLength, num_steps: int, *, tested: int, accepted: int) -> float:
    for _ in range(num_steps):
        policy.observe(8, MOST, tested=tested, accepted=accepted, step_s=1.0)
    return policy.acceptance


def test_what_was_learnt_of_drafts_is_forgotten_as_others_are_made_and_more_slowly_while_none_are() -> None:
    policy = DraftLength(MOST)
    assert learnt(policy, 200, tested=8, accepted=8) > 0.99
    assert learnt(policy, 50, tested=8, accepted=0) < 0.3
    policy = DraftLength(MOST)
    learnt(policy, 200, tested=8, accepted=0)
    assert learnt(policy, 100, tested=0, accepted=0) < 0.01
    assert learnt(policy, 3000, tested=0, accepted=0) > 0.4


@pytest.mark.parametrize("slow", [0, 1])
def test_one_slow_step_of_the_first_two_speaks_against_no_length(slow: int) -> None:
    """Of every length, drafts being right and for nothing: the most are best."""
    policy, tries = DraftLength(MOST), [0] * (MOST + 1)
    while min(tries) < 2:
        length = policy.choose(8)
        step_s = 10.0 if length == MOST and tries[length] == slow else 1.0
        policy.observe(8, length, tested=8 * length, accepted=8 * length, step_s=step_s)
        tries[length] += 1
    assert policy.choose(8) == MOST
