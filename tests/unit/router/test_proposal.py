"""What the router service proposes, and by which loads it is judged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from octet.config import BalancingConfig
from octet.ids import Epoch, WorkerId
from router.balancing.skew import drifted, skewed_loads
from router.placement import EMPTY, place_evenly
from router.proposal import Proposal, make_proposal
from router.routing import Routing
from router.transition import with_capacity

EPOCH, AUTO = Epoch(1), BalancingConfig(auto=True)
LAYERS, NUM_EXPERTS, TOP_K = tuple(range(1, 21)), 64, 8


def routing(num_shards: int, layers: tuple[int, ...] = LAYERS, num_experts: int = NUM_EXPERTS) -> Routing:
    placement = with_capacity(place_evenly(layers, num_experts, num_shards), num_experts)
    return Routing(epoch=EPOCH, shards=tuple(WorkerId(f"experts-{n}") for n in range(num_shards)), placement=placement)


def num_filled(routing: Routing) -> int:
    return int((routing.placement.physical_to_logical != EMPTY).sum())


class Cluster:
    """Moves its experts as `balancing.auto` does, by windows that are samples of what its users ask."""

    def __init__(self, num_shards: int, num_redundant: int, num_tokens: int) -> None:
        self.random = np.random.default_rng()
        self.rates_LE = skewed_loads(len(LAYERS), NUM_EXPERTS, TOP_K, self.random)
        self.routing, self.num_redundant, self.num_tokens = routing(num_shards), num_redundant, num_tokens

    def proposal(self, loads_LE: npt.NDArray[np.float64], judged_LE: npt.NDArray[np.float64] | None) -> Proposal:
        return make_proposal(self.routing, EPOCH, loads_LE, AUTO, self.num_redundant, 1, judged_LE=judged_LE)

    def look(self) -> bool:
        """Whether experts move."""
        rows_LE = self.rates_LE * self.num_tokens / 2
        earlier_LE, later_LE = (self.random.poisson(rows_LE).astype(np.float64) for _ in range(2))
        if not self.proposal(earlier_LE, later_LE).pays(AUTO.min_gain):
            return False
        self.routing = self.proposal(earlier_LE + later_LE, None).transition.target
        return True


@pytest.mark.parametrize(("num_shards", "num_redundant"), [(16, 16), (32, 32)])
def test_noise_moves_no_expert_for_long_and_a_drift_does(num_shards: int, num_redundant: int) -> None:
    cluster = Cluster(num_shards, num_redundant, num_tokens=1024)
    assert cluster.look(), "they are placed without regard to their loads"
    for _ in range(9):
        cluster.look()
    # One that comes late brings something: what it is judged by is no part of what it was planned by.
    assert sum(cluster.look() for _ in range(15)) <= 1
    cluster.rates_LE = drifted(cluster.rates_LE, 0.3, cluster.random)
    assert cluster.look()


def test_a_plan_is_judged_by_the_loads_that_are_given_for_it() -> None:
    current = routing(4, (1, 2), 16)
    loads_LE = np.ones((2, 16))
    loads_LE[:, :2] = 50.0
    assert make_proposal(current, EPOCH, loads_LE, AUTO, 0, 1).relative_gain > 0
    level = make_proposal(current, EPOCH, loads_LE, AUTO, 0, 1, judged_LE=np.ones((2, 16)))
    assert level.transition.fills
    assert level.relative_gain <= 0
    assert make_proposal(current, EPOCH, loads_LE, AUTO, 0, 1, judged_LE=np.zeros((2, 16))).relative_gain == 0


def test_as_many_slots_are_filled_as_come_where_their_number_is_another() -> None:
    current = routing(4, (1, 2, 3), 32)
    loads_LE = np.random.default_rng().gamma(0.3, 100.0, (3, 32))
    config = BalancingConfig(max_moves=2)
    proposal = make_proposal(current, EPOCH, loads_LE, config, 32, 1, resized=True)
    assert 2 < len(proposal.transition.fills) <= 96
    assert len(make_proposal(current, EPOCH, loads_LE, config, 32, 1).transition.fills) <= 2


def test_slots_that_are_given_back_are_empty_whatever_it_costs() -> None:
    loads_LE = np.random.default_rng().gamma(0.3, 100.0, (3, 32))
    grown = make_proposal(routing(4, (1, 2, 3), 32), EPOCH, loads_LE, AUTO, 16, 1, resized=True).transition.target
    assert num_filled(grown) > 3 * 32
    shrunk = make_proposal(grown, EPOCH, loads_LE, AUTO, 0, 1, resized=True).transition.target
    assert num_filled(shrunk) == 3 * 32
    assert shrunk.placement.version > grown.placement.version


def test_every_expert_that_has_two_copies_has_them_on_two_nodes() -> None:
    current = routing(4, (1, 2), 16)
    domains = {shard: number // 2 for number, shard in enumerate(current.shards)}
    config = BalancingConfig(two_domains=True, max_moves=0)
    loads_LE = np.random.default_rng().gamma(0.5, 100.0, (2, 16))
    proposal = make_proposal(current, EPOCH, loads_LE, config, 16, 1, domains=domains)
    held_LXC = proposal.transition.target.placement.physical_to_logical.reshape(2, 4, -1)
    for held_XC in held_LXC:
        assert all(set(held_XC[:2].ravel()) >= {e} and set(held_XC[2:].ravel()) >= {e} for e in range(16))
    assert proposal.transition.needed
    assert proposal.pays(min_gain=0.99)
    again = make_proposal(proposal.transition.target, EPOCH, loads_LE, config, 16, 1, domains=domains)
    assert not again.transition.fills
