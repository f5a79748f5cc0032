from __future__ import annotations

import numpy as np
import pytest

from octet.ids import Epoch
from router.placement import EMPTY, from_physical, place_evenly
from router.service import RouterService

LAYERS, NUM_EXPERTS, NUM_SHARDS = (3, 4), 7, 3


@pytest.fixture
def service() -> RouterService:
    return RouterService(place_evenly(LAYERS, NUM_EXPERTS, NUM_SHARDS), Epoch(1))


def test_every_layer_is_reported_under_its_own_number(service: RouterService) -> None:
    assert [load.layer for load in service.layer_loads()] == [3, 4]


def test_there_is_no_balance_before_any_traffic(service: RouterService) -> None:
    assert [(load.tokens_E, load.balancedness) for load in service.layer_loads()] == [((0,) * NUM_EXPERTS, 0.0)] * 2


def test_counts_of_slots_become_counts_of_the_experts_in_them(service: RouterService) -> None:
    rng = np.random.default_rng()
    tokens_LE = rng.integers(1, 1000, (len(LAYERS), NUM_EXPERTS))
    for shard in range(NUM_SHARDS):
        held = service.placement.held_by(shard)
        service.record(
            shard,
            {
                layer: np.array([0 if expert == EMPTY else tokens_LE[index, expert] for expert in held[index]])
                for index, layer in enumerate(LAYERS)
            },
        )
    assert [load.tokens_E for load in service.layer_loads()] == [tuple(row) for row in tokens_LE.tolist()]


def test_replicas_of_an_expert_are_counted_together() -> None:
    placement = from_physical(np.array([[0, 1, 1, EMPTY]], dtype=np.int32), (0,), 2, 2, 1)
    service = RouterService(placement, Epoch(1))
    service.record(0, {0: np.array([5, 20])})
    service.record(1, {0: np.array([7, 0])})
    assert service.layer_loads()[0].tokens_E == (5, 27)


def test_balancedness_is_mean_over_maximum_of_the_shards() -> None:
    service = RouterService(place_evenly((0,), 4, 2), Epoch(1))
    service.record(0, {0: np.array([10, 20])})
    service.record(1, {0: np.array([0, 10])})
    assert service.layer_loads()[0].balancedness == pytest.approx(20 / 30)


def test_a_shard_that_has_not_reported_counts_as_idle() -> None:
    service = RouterService(place_evenly((0,), 4, 2), Epoch(1))
    service.record(1, {0: np.array([4, 4])})
    assert service.layer_loads()[0].balancedness == 0.5


def test_a_newer_report_replaces_the_last() -> None:
    service = RouterService(place_evenly((0,), 4, 2), Epoch(1))
    service.record(0, {0: np.array([1, 2])})
    service.record(0, {0: np.array([3, 5])})
    assert service.layer_loads()[0].tokens_E == (3, 5, 0, 0)
