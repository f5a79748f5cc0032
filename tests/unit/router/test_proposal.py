"""What the router service proposes, and by which loads it is judged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from octet.config import BalancingConfig
from octet.ids import Epoch, WorkerId
from router.balancing.measure import balancedness, shard_loads
from router.balancing.skew import drifted, skewed_loads
from router.placement import EMPTY, place_evenly
from router.proposal import Proposal, make_proposal
from router.routing import Routing
from router.transition import SlotFill, Transition, missing_experts, with_capacity

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


def skewed(num_layers: int, num_experts: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng().gamma(0.3, 100.0, (num_layers, num_experts))


def with_gain(relative_gain: float, num_fills: int) -> Proposal:
    current = routing(2, (1,), 4)
    fill = SlotFill(shard=current.shards[0], layer=1, slot=2, expert=3, source=current.shards[1])
    transition = Transition(target=current, fills=(fill,) * num_fills, gain=1.0, reason="")
    return Proposal(transition=transition, num_bytes=0, balancedness=(0.5, 1.0), relative_gain=relative_gain)


def test_a_proposal_pays_from_the_least_gain_on_and_only_if_it_moves_something() -> None:
    assert with_gain(0.25, 1).pays(min_gain=0.25)
    assert not with_gain(0.25, 1).pays(min_gain=0.26)
    assert not with_gain(0.0, 0).pays(min_gain=0.0)


def test_what_a_proposal_moves_and_brings_is_what_its_target_does() -> None:
    current, judged_LE = routing(4, (1, 2, 3), 32), skewed(3, 32)
    proposal = make_proposal(current, EPOCH, skewed(3, 32), AUTO, 0, 3 * 2**20, judged_LE=judged_LE)
    before_LX, after_LX = (shard_loads(one.placement, judged_LE) for one in (current, proposal.transition.target))
    num_fills = len(proposal.transition.fills)
    assert num_fills > 1
    assert proposal.num_bytes == num_fills * 3 * 2**20
    assert proposal.summary.startswith(f"{num_fills} experts ({num_fills * 3}.0 MiB) move, ")
    assert proposal.balancedness == pytest.approx((balancedness(before_LX).mean(), balancedness(after_LX).mean()))
    peaks_before, peaks_after = before_LX.max(1).sum(), after_LX.max(1).sum()
    assert proposal.relative_gain == pytest.approx(1 - peaks_after / peaks_before)


def test_a_tenth_of_what_is_held_moves_at_once_unless_the_configuration_says_otherwise() -> None:
    current = routing(8, (1, 2, 3), 32)
    # The first shards' experts are in demand, so that more moves would bring more.
    loads_LE = skewed(3, 32) + np.repeat([200.0, 1.0], 16)
    assert 0 < len(make_proposal(current, EPOCH, loads_LE, AUTO, 0, 1).transition.fills) <= 9
    config = BalancingConfig(max_moves=48)
    assert 9 < len(make_proposal(current, EPOCH, loads_LE, config, 0, 1).transition.fills) <= 48


@pytest.mark.parametrize("num_redundant", [0, 8])
def test_where_shards_come_or_go_only_what_has_to_move_does(num_redundant: int) -> None:
    current = routing(4, (1, 2, 3), 32)
    first, newcomer = current.shards[0], WorkerId("experts-9")
    for leaving, lost in (([first], []), ([], [first])):
        proposal = make_proposal(current, EPOCH, skewed(3, 32), AUTO, num_redundant, 1, leaving=leaving, lost=lost)
        moved = sorted((fill.layer, fill.expert) for fill in proposal.transition.fills)
        assert moved == missing_experts(current, [first])
    proposal = make_proposal(current, EPOCH, skewed(3, 32), AUTO, num_redundant, 1, joining=[newcomer])
    assert {fill.shard for fill in proposal.transition.fills} <= {newcomer}


def test_slots_that_are_given_back_make_room_for_as_many_moves() -> None:
    current, num_layers = routing(4, LAYERS, 32), len(LAYERS)
    grown = make_proposal(current, EPOCH, skewed(num_layers, 32), AUTO, 16, 1, resized=True).transition.target
    num_more = num_filled(grown) - num_filled(current)
    config, loads_LE = BalancingConfig(max_moves=0), skewed(num_layers, 32)
    shrunk = make_proposal(grown, EPOCH, loads_LE, config, 0, 1, resized=True).transition
    # What would be lost with its slot has to move, and comes on top.
    num_needed = len(make_proposal(grown, EPOCH, loads_LE, config, 0, 1).transition.fills)
    assert num_filled(shrunk.target) == num_filled(current)
    assert num_needed < len(shrunk.fills) <= num_needed + num_more


def test_second_copies_wait_until_what_was_lost_is_served_again() -> None:
    current, config = routing(4, (1, 2), 16), BalancingConfig(two_domains=True, max_moves=0)
    domains = {shard: number // 2 for number, shard in enumerate(current.shards)}
    doubled = make_proposal(current, EPOCH, skewed(2, 16), config, 16, 1, domains=domains).transition.target
    lost = make_proposal(
        doubled, EPOCH, skewed(2, 16), config, 16, 1, lost=[doubled.shards[0]], domains=domains
    ).transition
    assert (lost.fills, lost.needed) == ((), False)
    later = make_proposal(lost.target, EPOCH, skewed(2, 16), config, 16, 1, domains=domains).transition
    assert later.fills
    assert later.needed
