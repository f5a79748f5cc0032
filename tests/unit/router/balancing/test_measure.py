from __future__ import annotations

import numpy as np

from router.balancing.measure import balancedness
from router.balancing.planner import plan
from router.balancing.topology import Budget, Topology


def test_a_layer_without_load_is_level() -> None:
    assert balancedness(np.array([[0.0, 0.0], [1.0, 3.0]])).tolist() == [1.0, 2 / 3]


def test_shards_without_slots_do_not_count() -> None:
    loads_LX = np.array([[2.0, 2.0, 0.0]])
    assert balancedness(loads_LX, 2).tolist() == [1.0]
    result = plan(np.ones((1, 8)), Topology(slots=(4, 4, 0)), Budget(), None)
    assert result.reason == "a first placement, of balancedness 1.0000"
