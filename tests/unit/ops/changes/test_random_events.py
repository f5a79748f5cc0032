from __future__ import annotations

import random

from ops.bench.changes.random_events import LARGEST, draw_events

SIZES = {"prefill": 1, "decode": 1, "experts": 2}


def test_every_event_is_a_change_within_bounds() -> None:
    sizes = dict(SIZES)
    for event in draw_events(500, random.randrange(2**32), SIZES):
        assert event.size != sizes[event.pool]
        assert 1 <= event.size <= LARGEST[event.pool]
        sizes[event.pool] = event.size


def test_a_seed_draws_the_same_events_again() -> None:
    seed = random.randrange(2**32)
    assert list(draw_events(50, seed, SIZES)) == list(draw_events(50, seed, SIZES))
    assert list(draw_events(50, seed, SIZES)) != list(draw_events(50, seed + 1, SIZES))
