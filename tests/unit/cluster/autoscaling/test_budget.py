from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cluster.autoscaling.budget import fit
from cluster.members import POOLS, Pool


def three(prefill: float, decode: float, experts: float) -> dict[Pool, float]:
    return {"prefill": prefill, "decode": decode, "experts": experts}


sizes = st.fixed_dictionaries({name: st.integers(1, 12) for name in POOLS})
leaving = st.fixed_dictionaries({name: st.integers(0, 4) for name in POOLS})
NOBODY = dict.fromkeys(POOLS, 0)
gpus = st.fixed_dictionaries({name: st.sampled_from([0.5, 1, 2]) for name in POOLS})


@given(now=sizes, draining=leaving, targets=sizes, gpus=gpus, more=st.floats(0, 30))
def test_the_budget_holds_also_while_members_that_leave_still_hold_their_gpus(
    now: dict[Pool, int], draining: dict[Pool, int], targets: dict[Pool, int], gpus: dict[Pool, float], more: float
) -> None:
    max_gpus = sum((now[pool] + draining[pool]) * gpus[pool] for pool in POOLS) + more
    granted, short = fit(now, draining, targets, dict.fromkeys(POOLS, 1), gpus, max_gpus)
    assert sum((max(now[pool], granted[pool]) + draining[pool]) * gpus[pool] for pool in POOLS) <= max_gpus + 1e-9
    for pool in POOLS:
        assert min(now[pool], targets[pool]) <= granted[pool] <= max(now[pool], targets[pool])
        assert (pool in short) == (granted[pool] < targets[pool])


@given(now=sizes, targets=sizes, gpus=gpus)
def test_without_a_budget_everyone_gets_what_it_asks_for(
    now: dict[Pool, int], targets: dict[Pool, int], gpus: dict[Pool, float]
) -> None:
    assert fit(now, NOBODY, targets, dict.fromkeys(POOLS, 1), gpus, None) == (targets, frozenset())


def test_growth_goes_to_who_has_the_smallest_part_of_what_it_asks_for() -> None:
    ones = dict.fromkeys(POOLS, 1.0)
    granted, short = fit(dict.fromkeys(POOLS, 1), NOBODY, {"prefill": 3, "decode": 9, "experts": 1},
                         dict.fromkeys(POOLS, 1), ones, 9.0)  # fmt: skip
    assert granted == {"prefill": 2, "decode": 6, "experts": 1}
    assert short == {"prefill", "decode"}


def test_a_budget_that_has_become_too_small_is_kept_by_shrinking() -> None:
    now: dict[Pool, int] = {"prefill": 4, "decode": 8, "experts": 4}
    granted, _ = fit(now, NOBODY, now, dict.fromkeys(POOLS, 1), dict.fromkeys(POOLS, 1.0), 10.0)
    assert sum(granted.values()) == 10
    assert min(granted.values()) >= 1


def test_nobody_gives_what_members_that_leave_will_give_back_anyway() -> None:
    now: dict[Pool, int] = {"prefill": 2, "decode": 3, "experts": 2}
    granted, _ = fit(now, NOBODY | {"decode": 4}, now, dict.fromkeys(POOLS, 1), dict.fromkeys(POOLS, 1.0), 8.0)
    assert granted == now
