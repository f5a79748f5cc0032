from __future__ import annotations

import dataclasses
import inspect
import pathlib
import sys
import types
from collections import Counter
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.gate import Gate
from router.placement import EMPTY, Placement, from_physical, place_evenly
from router.plan import FEW_ROWS, Planner, ShardPlan

LAYER = 5


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A placement, and the experts that some tokens have chosen, with a weight for each."""

    placement: Placement
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor

    def plan(self) -> list[ShardPlan | None]:
        plan = Planner(self.placement, torch.device("cpu")).plan(LAYER, self.expert_ids_TK, self.weights_TK)
        return [plan.of(shard) for shard in range(self.placement.num_shards)]


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    num_experts, num_shards = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    redundant = draw(st.lists(st.integers(0, num_experts - 1), max_size=6))
    slots = [*range(num_experts), *redundant]
    slots += [EMPTY] * (-len(slots) % num_shards)
    row = draw(st.permutations(slots))
    other_layer = draw(st.permutations(slots))
    placement = from_physical(
        np.array([other_layer, row], dtype=np.int32), (LAYER - 1, LAYER), num_experts, num_shards, version=1
    )
    num_tokens, per_token = draw(st.integers(0, 12)), draw(st.integers(1, num_experts))
    chosen = [draw(st.permutations(range(num_experts)))[:per_token] for _ in range(num_tokens)]
    expert_ids_TK = torch.tensor(chosen, dtype=torch.long).view(num_tokens, per_token)
    weights_TK = (torch.arange(num_tokens * per_token) + 1.0).view(num_tokens, per_token)
    return Routing(placement=placement, expert_ids_TK=expert_ids_TK, weights_TK=weights_TK)


def asked(routing: Routing) -> list[tuple[int, int, int, float]]:
    """(shard, token, expert, weight) of every slot that some row asks for."""
    placement = routing.placement
    found = []
    for shard, plan in enumerate(routing.plan()):
        if plan is not None:
            held = placement.held_by(shard)[placement.layers.index(LAYER)]
            for token, slots, weights in zip(
                tokens_of(plan), plan.slots_UK.tolist(), plan.weights_UK.tolist(), strict=True
            ):
                found += [
                    (shard, token, int(held[slot]), weight)
                    for slot, weight in zip(slots, weights, strict=True)
                    if slot != EMPTY
                ]
    return found


def tokens_of(part: ShardPlan) -> list[int]:
    assert part.rows_U is not None
    tokens: list[int] = part.rows_U.tolist()
    return tokens


@given(routings())
def test_every_choice_of_a_token_is_asked_for_exactly_once_with_its_weight(routing: Routing) -> None:
    expected = Counter(
        (token, expert, weight)
        for token, (experts, weights) in enumerate(
            zip(routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
        )
        for expert, weight in zip(experts, weights, strict=True)
    )
    assert Counter((token, expert, weight) for _, token, expert, weight in asked(routing)) == expected


@given(routings())
def test_a_token_goes_once_to_each_shard_that_is_asked_for_one_of_its_experts(routing: Routing) -> None:
    needed = {(shard, token) for shard, token, _, _ in asked(routing)}
    sent = [
        (shard, token) for shard, plan in enumerate(routing.plan()) if plan is not None for token in tokens_of(plan)
    ]
    assert sent == sorted(needed)


@given(routings())
def test_a_shard_that_no_token_needs_is_sent_nothing(routing: Routing) -> None:
    needed = {shard for shard, _, _, _ in asked(routing)}
    assert {shard for shard, plan in enumerate(routing.plan()) if plan is not None} == needed


@given(routings())
def test_slots_elsewhere_are_empty_and_weigh_nothing(routing: Routing) -> None:
    for plan in routing.plan():
        if plan is not None:
            assert not plan.weights_UK[plan.slots_UK < 0].any()
            assert (plan.slots_UK >= EMPTY).all()
            assert (plan.slots_UK < routing.placement.slots_per_shard).all()


@given(routings())
def test_slots_travel_as_int32_and_weights_as_fp32(routing: Routing) -> None:
    for plan in routing.plan():
        if plan is not None:
            assert (plan.slots_UK.dtype, plan.weights_UK.dtype) == (torch.int32, torch.float32)


@pytest.mark.parametrize(("num_tokens", "num_shards"), [(FEW_ROWS["cpu"] - 1, 1), (FEW_ROWS["cpu"], 2)])
def test_a_second_replica_is_used_from_so_many_rows_on(num_tokens: int, num_shards: int) -> None:
    routing = Routing(
        placement=from_physical(np.array([[0, 0]], dtype=np.int32), (LAYER,), 1, 2, version=1),
        expert_ids_TK=torch.zeros(num_tokens, 1, dtype=torch.long),
        weights_TK=torch.ones(num_tokens, 1),
    )
    assert len({shard for shard, _, _, _ in asked(routing)}) == num_shards


@given(routings())
def test_the_torch_operators_that_gpus_use_plan_alike(routing: Routing) -> None:
    planner, arguments = (
        Planner(routing.placement, torch.device("cpu")),
        (LAYER, routing.expert_ids_TK, routing.weights_TK),
    )
    ours_all, theirs_all = planner._plan_on_cpu(*arguments), planner._plan_on_gpu(*arguments)
    for shard in range(routing.placement.num_shards):
        ours, theirs = ours_all.of(shard), theirs_all.of(shard)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert tokens_of(ours) == tokens_of(theirs)
            assert torch.equal(ours.slots_UK, theirs.slots_UK)
            assert torch.equal(ours.weights_UK, theirs.weights_UK)
        our_arrays, their_arrays = ours_all.stacked().arrays_of(shard), theirs_all.stacked().arrays_of(shard)
        assert (our_arrays is None) == (their_arrays is None)
        if our_arrays is not None and their_arrays is not None:
            for part in range(3):
                assert np.array_equal(our_arrays[part], their_arrays[part])


def test_no_tokens_go_nowhere() -> None:
    planner = Planner(place_evenly((LAYER,), 4, 2), torch.device("cpu"))
    plan = planner.plan(LAYER, torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2))
    assert [plan.of(shard) for shard in range(2)] == [None, None]
    assert [plan.stacked().arrays_of(shard) for shard in range(2)] == [None, None]


@given(routings(), st.integers(0, 2**12 - 1))
def test_a_dense_plan_asks_for_every_choice_of_a_real_token_exactly_once(routing: Routing, mask: int) -> None:
    """All tokens are sent to all shards; on one of them each choice of a token is there."""
    placement, num_tokens = routing.placement, len(routing.expert_ids_TK)
    real_T = torch.tensor([bool(mask >> token & 1) for token in range(num_tokens)], dtype=torch.bool)
    planner = Planner(placement, torch.device("cpu"))
    plan = planner._plan_densely(LAYER, routing.expert_ids_TK, routing.weights_TK, real_T)
    found: Counter[tuple[int, int, float]] = Counter()
    for shard in range(placement.num_shards):
        part = plan.of(shard)
        assert part.rows_U is None
        held = placement.held_by(shard)[placement.layers.index(LAYER)]
        for token, (slots, weights) in enumerate(zip(part.slots_UK.tolist(), part.weights_UK.tolist(), strict=True)):
            found.update((token, int(held[s]), w) for s, w in zip(slots, weights, strict=True) if s != EMPTY)
        arrays = plan.stacked().arrays_of(shard)
        assert (arrays is None) == (num_tokens == 0)
        if arrays is not None:
            rows_T, slots_TK, weights_TK = arrays
            assert rows_T.tolist() == list(range(num_tokens))
            assert np.array_equal(slots_TK, part.slots_UK.numpy())
            assert np.array_equal(weights_TK, part.weights_UK.numpy())
    assert found == Counter(
        (token, expert, weight)
        for token, (experts, weights) in enumerate(
            zip(routing.expert_ids_TK.tolist(), routing.weights_TK.tolist(), strict=True)
        )
        for expert, weight in zip(experts, weights, strict=True)
        if real_T[token]
    )


@given(routings())
def test_a_dense_plan_reads_one_replica_of_an_expert_whatever_the_batch(routing: Routing) -> None:
    planner = Planner(routing.placement, torch.device("cpu"))
    every_E1 = torch.arange(routing.placement.num_experts).unsqueeze(1)
    weights_E1 = torch.ones(every_E1.shape)
    together = planner._plan_densely(LAYER, every_E1, weights_E1, None)
    for expert in range(routing.placement.num_experts):
        alone = planner._plan_densely(LAYER, every_E1[expert : expert + 1], weights_E1[expert : expert + 1], None)
        assert torch.equal(alone.slots_XTK[:, 0], together.slots_XTK[:, expert])


def test_shards_read_as_many_experts_by_a_dense_plan_where_all_are_hit() -> None:
    """Every expert is on every shard."""
    num_experts, num_shards = 12, 3
    held = np.tile(np.arange(num_experts, dtype=np.int32), num_shards)[None]
    planner = Planner(from_physical(held, (LAYER,), num_experts, num_shards, version=1), torch.device("cpu"))
    every_E1 = torch.arange(num_experts).unsqueeze(1)
    plan = planner._plan_densely(LAYER, every_E1, torch.ones(every_E1.shape), None)
    reads = [int((plan.of(shard).slots_UK != EMPTY).sum()) for shard in range(num_shards)]
    assert reads == [num_experts // num_shards] * num_shards


@pytest.mark.parametrize(("layer", "shards"), [(LAYER - 1, {0}), (LAYER, {0, 1})])
def test_the_operators_that_gpus_use_divide_the_rows_of_the_layers_that_have_replicas(
    layer: int, shards: set[int]
) -> None:
    held = np.array([[0, 1, 2, EMPTY], [0, 1, 2, 0]], np.int32)
    planner = Planner(from_physical(held, (LAYER - 1, LAYER), 3, 2, version=1), torch.device("cpu"))
    num_tokens = 2 * FEW_ROWS["cpu"]
    plan = planner._plan_on_gpu(layer, torch.zeros(num_tokens, 1, dtype=torch.long), torch.ones(num_tokens, 1))
    assert {shard for shard in range(2) if plan.of(shard) is not None} == shards


def test_tokens_that_only_fill_a_batch_up_go_nowhere_when_it_is_routed(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(place_evenly((LAYER,), 4, 2), torch.device("cpu"))
    # As on a GPU.
    monkeypatch.setattr(planner, "plan", planner._plan_densely)
    expert_ids_TK = torch.tensor([[0, 3], [1, 2], [3, 1]])
    selected = expert_ids_TK, torch.ones(expert_ids_TK.shape)
    gate = cast(Gate, types.SimpleNamespace(compiled=None, select=lambda x_TH: selected))
    plan = planner.route(LAYER, gate, torch.zeros(3, 8), torch.tensor([True, False, True]))
    parts = [plan.of(shard) for shard in range(2)]
    asked_TK = torch.stack([part.slots_UK != EMPTY for part in parts if part is not None]).any(0)
    assert asked_TK.tolist() == [[True, True], [False, False], [True, True]]


def test_a_planner_that_takes_over_plans_where_the_one_before_it_did() -> None:
    """On a GPU a captured graph reads the table that it was captured with."""
    before, after = (
        place_evenly((LAYER,), 6, 2),
        from_physical(np.array([[5, 4, 3, 2, 1, 0]], np.int32), (LAYER,), 6, 2, 2),
    )
    planners = [Planner(placement, torch.device("meta")) for placement in (before, after)]
    assert planners[1].take_over(planners[0])
    assert planners[1]._one_slot_LE is planners[0]._one_slot_LE
    other = Planner(place_evenly((LAYER,), 6, 3), torch.device("meta"))
    assert not other.take_over(planners[1])
    on_cpu = [Planner(placement, torch.device("cpu")) for placement in (before, after)]
    assert not on_cpu[1].take_over(on_cpu[0])


@pytest.mark.parametrize(
    "held",
    [
        pytest.param([0, 1, 2, EMPTY, 3, 4, 5, EMPTY], id="more slots"),
        pytest.param([0, 1, EMPTY, 2, 3, EMPTY, 4, 5, EMPTY], id="more shards"),
    ],
)
def test_a_planner_of_shards_that_are_other_in_number_or_in_size_takes_nothing_over(held: list[int]) -> None:
    num_shards = 2 if len(held) == 8 else 3
    other = from_physical(np.array([held], np.int32), (LAYER,), 6, num_shards, version=2)
    before, after = (Planner(placement, torch.device("meta")) for placement in (place_evenly((LAYER,), 6, 2), other))
    assert not after.take_over(before)
    assert after._one_slot_LE is not before._one_slot_LE


def test_what_a_captured_graph_reads_is_what_the_planner_that_takes_over_has(monkeypatch: pytest.MonkeyPatch) -> None:
    held = np.random.default_rng().permutation(6).astype(np.int32)
    placements = place_evenly((LAYER,), 6, 2), from_physical(held[None], (LAYER,), 6, 2, version=2)
    before, after = (Planner(placement, torch.device("cpu")) for placement in placements)
    captured_LE, wanted_LE = before._one_slot_LE, after._one_slot_LE.clone()
    # A device whose tensors can be looked at.
    monkeypatch.setattr(after, "_device", torch.device("meta"))
    assert after.take_over(before)
    assert torch.equal(captured_LE, wanted_LE)
    assert after._one_slot_LE is captured_LE


def test_a_planner_of_a_device_has_its_slots_when_it_is_built_even_where_assertions_are_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As with `python -O`. In a step, which is in inference mode, they would be made too late to be written to."""
    module = types.ModuleType("plan_without_assertions")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    source = pathlib.Path(inspect.getfile(Planner))
    exec(compile(source.read_text(), source, "exec", optimize=1), vars(module))
    planner = module.Planner(place_evenly((LAYER,), 6, 2), torch.device("meta"))
    assert "_one_slot_LE" in vars(planner)
