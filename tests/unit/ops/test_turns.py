"""Two processes that want one core."""

from __future__ import annotations

from ops.bench.turns import turn_s


def test_who_spins_beside_another_keeps_the_core_for_a_while() -> None:
    assert 2e-4 < turn_s() < 0.2
