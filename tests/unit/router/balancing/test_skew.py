from __future__ import annotations

import numpy as np
import pytest

from router.balancing.skew import drifted, sampled_experts, skewed_loads


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def test_a_layer_sums_to_the_experts_of_a_token(rng: np.random.Generator) -> None:
    loads_LE = skewed_loads(5, 160, 8, rng)
    np.testing.assert_allclose(loads_LE.sum(1), 8, rtol=1e-9)
    assert ((loads_LE > 0) & (loads_LE < 1)).all()


def test_drift_swaps_the_loads_of_a_share_of_the_experts_with_others(rng: np.random.Generator) -> None:
    loads_LE = skewed_loads(4, 160, 8, rng)
    moved_LE = drifted(loads_LE, 0.2, rng)
    assert np.array_equal(np.sort(moved_LE), np.sort(loads_LE))
    assert (moved_LE != loads_LE).sum(1).tolist() == [64] * 4


def test_samples_reach_experts_as_often_as_their_loads_say(rng: np.random.Generator) -> None:
    loads_E = skewed_loads(1, 32, 4, rng)[0]
    expert_ids_TK = sampled_experts(loads_E, 20_000, 4, rng)
    assert all(len(set(experts)) == 4 for experts in expert_ids_TK[:100].tolist())
    np.testing.assert_allclose(np.bincount(expert_ids_TK.ravel(), minlength=32) / 20_000, loads_E, atol=0.04)
