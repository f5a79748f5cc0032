"""What the simulator assumes about shards that are not level, held against a network that is played frame by frame."""

from __future__ import annotations

import heapq

import numpy as np
import numpy.typing as npt
import pytest


def steps_per_s(work_LX: npt.NDArray[np.float64], num_workers: int, num_rounds: int) -> float:
    """Workers go from layer to layer; each asks every shard at once, and waits for the last of them to answer.

    Args:
        work_LX: seconds that a shard takes for a frame of a layer.
    """
    free_X = np.zeros(work_LX.shape[1])
    # Workers begin at different layers.
    sends = [(0.0, worker * len(work_LX) // num_workers) for worker in range(num_workers)]
    heapq.heapify(sends)
    for _ in range(num_rounds):
        at_s, layer = heapq.heappop(sends)
        free_X = np.maximum(free_X, at_s) + work_LX[layer]
        heapq.heappush(sends, (float(free_X.max()), (layer + 1) % len(work_LX)))
    return num_rounds / len(work_LX) / sends[0][0]


@pytest.mark.parametrize("num_shards", [16, 32])
def test_lanes_that_do_not_wait_for_each_other_use_up_the_shard_with_most_to_do_over_all_layers(
    num_shards: int,
) -> None:
    work_LX = np.random.default_rng().gamma(5.0, size=(89, num_shards)) * 1e-3
    assert (work_LX.mean(1) / work_LX.max(1)).mean() < 0.6, "layers by themselves are far from level"
    capacity = 1 / work_LX.sum(0).max()
    assert 0.8 < steps_per_s(work_LX, num_workers=20, num_rounds=20_000) / capacity < 1.05
    # And not what the fullest shard of every layer would allow.
    assert capacity > 1.6 / work_LX.max(1).sum()
