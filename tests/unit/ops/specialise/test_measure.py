from __future__ import annotations

import random

import numpy as np
import pytest

from ops.specialise.measure import Specialisation, affinities, count_experts, specialisation, triggers


def measured(labels: list[str], counts_DLE: object, tokens: list[int] | None = None) -> Specialisation:
    counts = np.array(counts_DLE)
    return specialisation(labels, np.array(tokens or [10] * len(labels)), counts, np.random.default_rng())


def test_experts_are_counted_by_layer() -> None:
    rng = np.random.default_rng()
    experts_LTK = np.stack([[rng.permutation(9)[:3] for _ in range(50)] for _ in range(4)]).astype(np.int16)
    counts_LE = count_experts(experts_LTK, 9)
    assert counts_LE.tolist() == [[int((layer == expert).sum()) for expert in range(9)] for layer in experts_LTK]


def test_experts_with_a_label_each_tell_everything() -> None:
    found = measured(["a", "a", "b", "b"], [[[10, 0]], [[10, 0]], [[0, 10]], [[0, 10]]])
    assert found.information_L.tolist() == pytest.approx([1.0])
    assert found.lift_BLE[:, 0].tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_experts_chosen_alike_by_all_labels_tell_nothing() -> None:
    found = measured(["a", "b", "c"], [[[4, 6]], [[4, 6]], [[4, 6]]])
    assert found.information_L.tolist() == pytest.approx([0.0])
    np.testing.assert_allclose(found.lift_BLE, 1.0)


def test_layers_are_measured_one_by_one() -> None:
    found = measured(["a", "b"], [[[10, 0], [5, 5]], [[0, 10], [5, 5]]])
    assert found.information_L.tolist() == pytest.approx([1.0, 0.0])


def test_labels_weigh_alike_however_long_their_texts_are() -> None:
    short = measured(["a", "b"], [[[8, 2]], [[2, 8]]], tokens=[10, 10])
    long = measured(["a", "b"], [[[8, 2]], [[2000, 8000]]], tokens=[10, 10_000])
    np.testing.assert_allclose(short.share_BLE, long.share_BLE)
    np.testing.assert_allclose(short.information_L, long.information_L)


def test_shares_are_of_a_labels_tokens() -> None:
    found = measured(["a", "a", "b"], [[[1, 9]], [[3, 27]], [[5, 5]]], tokens=[10, 30, 10])
    assert found.tokens_B.tolist() == [40, 10]
    assert found.share_BLE[:, 0].tolist() == [[0.1, 0.9], [0.5, 0.5]]


def test_documents_that_differ_for_no_label_are_chance() -> None:
    """In the mean over layers that know nothing of each other: one alone may be far off by chance."""
    rng = np.random.default_rng()
    counts = rng.multinomial(200, rng.dirichlet([0.3] * 16, size=(60, 200)))
    found = measured([random.choice("abcdef") for _ in range(54)] + list("abcdef"), counts, [100] * 60)
    assert found.information_L.mean() > 0.01
    assert found.chance_L.mean() == pytest.approx(found.information_L.mean(), rel=0.2)


def test_labels_that_differ_are_more_than_chance() -> None:
    rng = np.random.default_rng()
    shares = rng.dirichlet([0.3] * 16, size=6)
    counts = np.stack([rng.multinomial(200, shares[d % 6]) for d in range(60)]).reshape(60, 1, 16)
    found = measured([str(d % 6) for d in range(60)], counts, [100] * 60)
    assert found.information_L[0] > 3 * found.chance_L[0]


def test_an_expert_that_nobody_chose_is_nobodys_specialist() -> None:
    found = measured(["a", "b"], [[[10, 0, 0]], [[5, 5, 0]]])
    assert found.lift_BLE[:, 0, 2].tolist() == [1.0, 1.0]
    assert np.isfinite(found.information_L).all()


def test_an_experts_triggers_are_the_tokens_it_is_chosen_for() -> None:
    """Token 7 always goes to expert 2, all others go anywhere."""
    rng = np.random.default_rng()
    token_ids_T = rng.integers(0, 30, 3000)
    experts_TK = np.stack([rng.permutation(8)[:2] for _ in token_ids_T])
    experts_TK[token_ids_T == 7] = [2, 5]
    found = triggers(token_ids_T, experts_TK, 8, most=4)
    assert found[2][0].token_id == found[5][0].token_id == 7
    assert (found[2][0].seen, found[2][0].rate) == ((token_ids_T == 7).sum(), 1.0)
    assert all(7 not in [trigger.token_id for trigger in found[expert]] for expert in (0, 1, 3, 4, 6, 7))


def test_frequent_triggers_come_before_rare_ones_of_the_same_rate() -> None:
    token_ids_T = np.array([1] * 50 + [2] * 5 + [3] * 500)
    experts_TK = np.array([[0]] * 55 + [[1]] * 500)
    assert [trigger.token_id for trigger in triggers(token_ids_T, experts_TK, 2, most=3)[0]] == [1, 2]


def test_what_was_seen_once_or_twice_is_no_trigger() -> None:
    token_ids_T = np.array([1, 1, 2, 2, 2, 3, 3, 3, 3])
    experts_TK = np.array([[0]] * 5 + [[1]] * 4)
    assert [trigger.token_id for trigger in triggers(token_ids_T, experts_TK, 2, most=3)[0]] == [2]


def test_a_tokens_affinity_is_the_weighted_mean_over_its_experts() -> None:
    found = measured(["a", "b"], [[[8, 4]], [[2, 4]]])
    affinity_BLT = affinities(found, np.array([[[0, 1]]]), np.array([[[3.0, 1.0]]]))
    assert affinity_BLT[:, 0, 0].tolist() == pytest.approx([0.75 * np.log2(1.6), 0.75 * np.log2(0.4)])


def test_an_affinity_has_bounds_where_a_lift_has_none() -> None:
    found = measured(["a", "b"], [[[8, 0]], [[0, 8]]])
    affinity_BLT = affinities(found, np.array([[[0], [1]]]), np.array([[[1.0], [1.0]]]))
    assert affinity_BLT[:, 0].tolist() == [[1.0, -4.0], [-4.0, 1.0]]
