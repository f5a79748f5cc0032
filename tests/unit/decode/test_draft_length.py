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
