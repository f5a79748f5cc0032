"""The choice of replicas, against an exhaustive search for few reads and against the linear optimum for level rows."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.balancing.planner import plan
from router.balancing.skew import sampled_experts, skewed_loads
from router.balancing.topology import Budget, Topology
from router.placement import Placement, from_physical
from router.plan_cpu import choose, replicas_of

NEVER_FEW, ALWAYS_FEW = 0, 2**31


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    placement: Placement
    expert_ids_TK: np.ndarray

    def chosen(self, few_rows: int) -> np.ndarray:
        """Physical slots `[T, K]`."""
        return choose(self.expert_ids_TK, replicas_of(self.placement)[0], self.placement.num_shards, few_rows)

    def shards_of(self, expert: int) -> list[int]:
        slots = self.placement.logical_to_physical[0, expert, : self.placement.num_replicas[0, expert]]
        return [int(slot) // self.placement.slots_per_shard for slot in slots]

    def rows(self, few_rows: int) -> np.ndarray:
        """Rows of each shard."""
        shards_TK = self.chosen(few_rows) // self.placement.slots_per_shard
        return np.bincount(shards_TK.ravel(), minlength=self.placement.num_shards)

    def reads(self, few_rows: int) -> np.ndarray:
        """Experts that each shard is asked for."""
        slots = np.unique(self.chosen(few_rows))
        return np.bincount(slots // self.placement.slots_per_shard, minlength=self.placement.num_shards)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Some expert has replicas, each on a shard of its own."""
    num_experts, num_shards = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    held: list[list[int]] = [[] for _ in range(num_shards)]
    for expert in range(num_experts):
        least = 2 if expert == 0 else 1
        for shard in draw(st.lists(st.integers(0, num_shards - 1), min_size=least, max_size=num_shards, unique=True)):
            held[shard].append(expert)
    width = max(map(len, held))
    row = [expert for experts in held for expert in [*experts, *[-1] * (width - len(experts))]]
    per_token = draw(st.integers(1, num_experts))
    tokens = draw(st.lists(st.permutations(range(num_experts)), min_size=1, max_size=12))
    return Batch(
        placement=from_physical(np.array([row], dtype=np.int32), (0,), num_experts, num_shards, version=1),
        expert_ids_TK=np.array([token[:per_token] for token in tokens], dtype=np.int64),
    )


@given(batches(), st.sampled_from([NEVER_FEW, 2, ALWAYS_FEW]))
def test_every_row_goes_to_a_slot_that_holds_its_expert(batch: Batch, few_rows: int) -> None:
    assert np.array_equal(batch.placement.physical_to_logical[0][batch.chosen(few_rows)], batch.expert_ids_TK)


@given(batches(), st.sampled_from([NEVER_FEW, 2, ALWAYS_FEW]))
def test_the_same_batch_is_chosen_for_alike(batch: Batch, few_rows: int) -> None:
    assert np.array_equal(batch.chosen(few_rows), batch.chosen(few_rows))


@given(batches())
def test_few_rows_read_each_expert_once_and_the_fullest_shard_as_few_as_can_be(batch: Batch) -> None:
    hit = np.unique(batch.expert_ids_TK).tolist()
    found = batch.reads(ALWAYS_FEW)
    assert found.sum() == len(hit)
    best = min(
        max(map(shards.count, shards)) for shards in itertools.product(*(batch.shards_of(expert) for expert in hit))
    )
    assert found.max() == best


@given(batches())
def test_many_rows_are_divided_as_evenly_as_replicas_allow_but_for_one_row(batch: Batch) -> None:
    count_E = np.bincount(batch.expert_ids_TK.ravel(), minlength=batch.placement.num_experts)
    shards = range(batch.placement.num_shards)
    # The worst set of shards by what only they can serve: the optimum, by max-flow and min-cut.
    least = max(
        -(-sum(int(count_E[e]) for e in range(len(count_E)) if set(batch.shards_of(e)) <= set(some)) // len(some))
        for size in range(1, len(shards) + 1)
        for some in itertools.combinations(shards, size)
    )
    assert batch.rows(NEVER_FEW).max() <= least + 1


@given(batches())
def test_two_shards_divide_the_rows_of_one_expert_at_most(batch: Batch) -> None:
    """Each of them reads its weights."""
    assert_two_shards_divide_one_expert_at_most(batch)


def test_experts_that_many_shards_divide_are_exchanged_between_each_two_of_them() -> None:
    rng, num_experts, num_shards = np.random.default_rng(), 8, 5
    for _ in range(100):
        on_EX = rng.permuted(np.tile(np.arange(num_shards) < rng.integers(2, 6), (num_experts, 1)), axis=1)
        held = np.where(on_EX.T, np.arange(num_experts), -1).reshape(1, -1).astype(np.int32)
        placement = from_physical(held, (0,), num_experts, num_shards, version=1)
        ids_TK = rng.integers(0, num_experts, (int(rng.integers(1, 60)), 1))
        batch = Batch(placement=placement, expert_ids_TK=ids_TK)
        assert_two_shards_divide_one_expert_at_most(batch)


def assert_two_shards_divide_one_expert_at_most(batch: Batch) -> None:
    shards_TK = batch.chosen(NEVER_FEW) // batch.placement.slots_per_shard
    for pair in itertools.combinations(range(batch.placement.num_shards), 2):
        of_each = [set(batch.expert_ids_TK[shards_TK == shard].tolist()) for shard in pair]
        assert len(set.intersection(*of_each)) <= 1


@given(st.integers(2, 4), st.integers(0, 30))
def test_an_expert_alone_is_divided_exactly(num_replicas: int, num_tokens: int) -> None:
    placement = from_physical(np.zeros((1, num_replicas), np.int32), (0,), 1, num_replicas, version=1)
    rows = Batch(placement=placement, expert_ids_TK=np.zeros((num_tokens, 1), np.int64)).rows(NEVER_FEW)
    assert rows.max() - rows.min() <= 1


@pytest.mark.parametrize(("num_tokens", "goal"), [(256, 0.97), (4096, 0.995)])
def test_two_more_slots_on_each_of_16_shards_level_a_batch(num_tokens: int, goal: float) -> None:
    rng = np.random.default_rng()
    loads_LE = skewed_loads(89, 160, 8, rng)
    placement = plan(loads_LE, Topology(slots=(12,) * 16), Budget(), None).placement
    levels = []
    for layer, loads_E in enumerate(loads_LE):
        ids_TK = sampled_experts(loads_E, num_tokens, 8, rng)
        shards_TK = choose(ids_TK, replicas_of(placement)[layer], 16, NEVER_FEW) // 12
        rows = np.bincount(shards_TK.ravel(), minlength=16)
        levels.append(rows.mean() / rows.max())
    assert np.mean(levels) >= goal


def test_batches_of_few_rows_do_not_all_go_to_the_same_of_equal_replicas() -> None:
    """Every expert is on every shard."""
    num_experts, num_shards = 16, 4
    held = np.tile(np.arange(num_experts, dtype=np.int32), num_shards)[None]
    placement = from_physical(held, (0,), num_experts, num_shards, version=1)
    batches = (Batch(placement=placement, expert_ids_TK=np.array([[expert]])) for expert in range(num_experts))
    assert np.sum([batch.rows(ALWAYS_FEW) for batch in batches], axis=0).tolist() == [num_experts // num_shards] * 4


def test_a_token_goes_to_no_more_shards_than_it_has_to() -> None:
    """Of shards that can be levelled either way, a token prefers one that it is sent to anyway."""
    # Expert 0 is on shard 0 alone, 1 on shard 1 alone, and 2 on both.
    placement = from_physical(np.array([[0, 2, 1, 2]], np.int32), (0,), 3, 2, version=1)
    tokens = np.array(np.random.default_rng().permutation([[0, 2]] * 8 + [[1, 2]] * 8))
    shards_TK = Batch(placement=placement, expert_ids_TK=tokens).chosen(NEVER_FEW) // 2
    assert (shards_TK[:, 0] == shards_TK[:, 1]).all()


@pytest.mark.parametrize("busy", [0, 1])
@pytest.mark.parametrize("num_rows", [3, 4])
def test_of_shards_that_read_as_many_experts_the_one_with_fewer_rows_gets_the_next(busy: int, num_rows: int) -> None:
    # Expert 0 is on shard 0 alone, 1 on shard 1 alone, and 2 on both.
    placement = from_physical(np.array([[0, 2, 1, 2]], np.int32), (0,), 3, 2, version=1)
    batch = Batch(placement=placement, expert_ids_TK=np.array([[busy]] * num_rows + [[1 - busy], [2]]))
    assert batch.rows(ALWAYS_FEW)[busy] == num_rows


@pytest.mark.parametrize("num_rows", [5, 6])
def test_the_rows_of_an_expert_that_was_just_placed_count_for_the_next(num_rows: int) -> None:
    # Three experts on both of two shards: one shard reads two of them, and those are the ones with few rows.
    placement = from_physical(np.array([[0, 1, 2, 0, 1, 2]], np.int32), (0,), 3, 2, version=1)
    batch = Batch(placement=placement, expert_ids_TK=np.array([[0]] * num_rows + [[1], [2]]))
    assert sorted(batch.rows(ALWAYS_FEW).tolist()) == [2, num_rows]


def test_few_rows_are_read_by_as_few_shards_as_can_be_where_several_are_too_full() -> None:
    rng, num_experts, num_shards = np.random.default_rng(), 8, 8
    # Every set of shards, and by what only they can serve the least that the fullest of them reads.
    sets = np.array(list(itertools.product([False, True], repeat=num_shards))[1:])
    for _ in range(100):
        on_EX = rng.permuted(np.tile(np.arange(num_shards) < 2, (num_experts, 1)), axis=1)
        least = max(-(-int((~on_EX[:, ~members]).all(1).sum()) // int(members.sum())) for members in sets)
        held = np.where(on_EX.T, np.arange(num_experts), -1).reshape(1, -1).astype(np.int32)
        placement = from_physical(held, (0,), num_experts, num_shards, version=1)
        batch = Batch(placement=placement, expert_ids_TK=rng.permutation(num_experts)[None])
        assert batch.reads(ALWAYS_FEW).max() == least


def test_experts_of_a_token_that_can_go_to_the_same_shard_do() -> None:
    # Expert 0 is on the first two of three shards and 1 on the last two; 2 is on the first alone, 3 on the last.
    placement = from_physical(np.array([[0, 2, 0, 1, 1, 3]], np.int32), (0,), 4, 3, version=1)
    batch = Batch(placement=placement, expert_ids_TK=np.array([[0, 1]] * 8 + [[2, 3]] * 4))
    first_T, second_T = batch.chosen(NEVER_FEW)[:8].T // 2
    assert (second_T == 1).any()
    assert (first_T[second_T == 1] == 1).all()
