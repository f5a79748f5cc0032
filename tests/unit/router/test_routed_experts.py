from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from experts.shard import ExpertShard
from experts.slots import ExpertSlots
from model.census import required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from model.linear import Packer
from model.weights import GateWeights
from octet.errors import ExpertMissingError, PeerLostError
from router.exchange import LocalExchange, Ticket
from router.gate import FEW_TOKENS, Gate
from router.placement import EMPTY, Placement, from_physical, place_evenly
from router.plan import Planner
from router.routed_experts import RoutedExperts

pytestmark = pytest.mark.usefixtures("fresh_seed")

NUM_EXPERTS, HIDDEN_SIZE, NUM_TOKENS = 8, 24, 50
CPU = torch.device("cpu")
LAYERS = (1, 2)


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> Checkpoint:
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 8,
        "moe_intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = required_tensors(read_config(tmp_path))
    save_file({name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.fixture
def gates() -> dict[int, GateWeights]:
    return {
        layer: GateWeights(weight=torch.randn(NUM_EXPERTS, HIDDEN_SIZE), correction_bias=torch.randn(NUM_EXPERTS))
        for layer in LAYERS
    }


def routed_over(
    checkpoint: Checkpoint,
    gates: dict[int, GateWeights],
    placement: Placement,
    held: Sequence[dict[int, list[int]]] | None = None,
) -> RoutedExperts:
    """Shards that hold what the placement says, or something else."""
    rows = held or [
        dict(zip(placement.layers, placement.held_by(shard).tolist(), strict=True))
        for shard in range(placement.num_shards)
    ]
    shards = [ExpertShard(ExpertSlots(checkpoint, row, torch.float32, CPU)) for row in rows]
    exchange = LocalExchange([shard.serve for shard in shards])
    routed = RoutedExperts(checkpoint.config, gates)
    routed.adopt(Planner(placement, CPU), exchange)
    return routed


def dense(checkpoint: Checkpoint, layer: int, x_TH: torch.Tensor, gate: GateWeights) -> torch.Tensor:
    """Each token's experts, one at a time."""
    y_TH = torch.zeros_like(x_TH)
    for token, (experts, weights) in enumerate(zip(*Gate(gate, checkpoint.config).select(x_TH), strict=True)):
        for expert, weight in zip(experts.tolist(), weights.tolist(), strict=True):
            names = [f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("gate", "up", "down")]
            gate_proj, up_proj, down_proj = checkpoint.read(names, torch.float32).values()
            x_H = x_TH[token]
            y_TH[token] += weight * (down_proj @ (F.silu(gate_proj @ x_H) * (up_proj @ x_H)))
    return y_TH


def replicated(num_shards: int) -> Placement:
    """Every expert twice, anywhere, and some empty slots."""
    slots = [*range(NUM_EXPERTS), *range(NUM_EXPERTS)]
    slots += [EMPTY] * (num_shards - len(slots) % num_shards)
    rows = np.array([random.sample(slots, len(slots)) for _ in LAYERS], dtype=np.int32)
    return from_physical(rows, LAYERS, NUM_EXPERTS, num_shards, version=1)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8])
@pytest.mark.parametrize("layer", LAYERS)
def test_shards_together_equal_a_loop_over_the_experts(
    checkpoint: Checkpoint, gates: dict[int, GateWeights], num_shards: int, layer: int
) -> None:
    routed = routed_over(checkpoint, gates, place_evenly(LAYERS, NUM_EXPERTS, num_shards))
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    found = routed.combine(routed.dispatch(layer, x_TH))
    torch.testing.assert_close(found, dense(checkpoint, layer, x_TH, gates[layer]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_replicas_equal_a_loop_over_the_experts(
    checkpoint: Checkpoint, gates: dict[int, GateWeights], num_shards: int
) -> None:
    routed = routed_over(checkpoint, gates, replicated(num_shards))
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    found = routed.combine(routed.dispatch(2, x_TH))
    torch.testing.assert_close(found, dense(checkpoint, 2, x_TH, gates[2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, FEW_TOKENS, FEW_TOKENS + 1])
@pytest.mark.parametrize("has_replicas", [False, True])
def test_gate_and_plan_in_one_call_are_what_they_are_one_by_one(
    checkpoint: Checkpoint, gates: dict[int, GateWeights], num_tokens: int, has_replicas: bool
) -> None:
    planner = Planner(replicated(3) if has_replicas else place_evenly(LAYERS, NUM_EXPERTS, 3), CPU)
    packer = Packer()
    weight, rows_EH = packer.matrix(NUM_EXPERTS, HIDDEN_SIZE)
    rows_EH.normal_(std=0.3)
    packer.pack()
    gate = Gate(GateWeights(weight=weight, correction_bias=gates[2].correction_bias), checkpoint.config)
    x_TH = torch.randn(num_tokens, HIDDEN_SIZE)
    found, expected = planner.route(2, gate, x_TH), planner.plan(2, *gate.select(x_TH))
    for shard in range(3):
        ours, theirs = found.stacked().arrays_of(shard), expected.stacked().arrays_of(shard)
        assert (ours is None) == (theirs is None)
        for one, other in zip(ours or (), theirs or (), strict=True):
            np.testing.assert_array_equal(one, other)


def test_two_rounds_may_be_open_at_once(checkpoint: Checkpoint, gates: dict[int, GateWeights]) -> None:
    routed = routed_over(checkpoint, gates, place_evenly(LAYERS, NUM_EXPERTS, 2))
    first_TH, second_TH = torch.randn(5, HIDDEN_SIZE), torch.randn(9, HIDDEN_SIZE)
    first, second = routed.dispatch(1, first_TH), routed.dispatch(1, second_TH)
    torch.testing.assert_close(routed.combine(first), dense(checkpoint, 1, first_TH, gates[1]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(routed.combine(second), dense(checkpoint, 1, second_TH, gates[1]), rtol=1e-4, atol=1e-4)


def test_sums_over_shards_of_a_bf16_model_are_fp32(checkpoint: Checkpoint, gates: dict[int, GateWeights]) -> None:
    placement = place_evenly(LAYERS, NUM_EXPERTS, 2)
    rows = [dict(zip(LAYERS, placement.held_by(shard).tolist(), strict=True)) for shard in range(2)]
    shards = [ExpertShard(ExpertSlots(checkpoint, row, torch.bfloat16, CPU)) for row in rows]
    exchange = LocalExchange([shard.serve for shard in shards])
    routed = RoutedExperts(checkpoint.config, gates)
    routed.adopt(Planner(placement, CPU), exchange)
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE).bfloat16()
    assert routed.combine(routed.dispatch(1, x_TH)).dtype == torch.float32


def test_a_missing_expert_is_an_error_and_never_zeros(checkpoint: Checkpoint, gates: dict[int, GateWeights]) -> None:
    gates[1].correction_bias[3] = 10.0
    held = [{layer: [EMPTY if expert == 3 else expert for expert in range(NUM_EXPERTS)] for layer in LAYERS}]
    routed = routed_over(checkpoint, gates, place_evenly(LAYERS, NUM_EXPERTS, 1), held)
    with pytest.raises(ExpertMissingError, match=r"no expert in slot 3"):
        routed.dispatch(1, torch.randn(NUM_TOKENS, HIDDEN_SIZE))


def test_a_missing_expert_that_nobody_asks_for_does_no_harm(
    checkpoint: Checkpoint, gates: dict[int, GateWeights]
) -> None:
    gates[1].correction_bias[3] = -10.0
    held = [{layer: [EMPTY if expert == 3 else expert for expert in range(NUM_EXPERTS)] for layer in LAYERS}]
    routed = routed_over(checkpoint, gates, place_evenly(LAYERS, NUM_EXPERTS, 1), held)
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    found = routed.combine(routed.dispatch(1, x_TH))
    torch.testing.assert_close(found, dense(checkpoint, 1, x_TH, gates[1]), rtol=1e-4, atol=1e-4)


def test_after_a_refusal_what_was_under_way_is_dropped_and_the_next_step_works(
    checkpoint: Checkpoint, gates: dict[int, GateWeights]
) -> None:
    placement = place_evenly(LAYERS, NUM_EXPERTS, 2)
    routed = routed_over(checkpoint, gates, placement)
    x_TH = torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    # As a forward pass does, which has ended when the rest is dropped.
    with torch.inference_mode():
        for layer in LAYERS:
            routed.dispatch(layer, x_TH)
    routed.drain()
    y_TH = routed.combine(routed.dispatch(LAYERS[0], x_TH))
    torch.testing.assert_close(y_TH, dense(checkpoint, LAYERS[0], x_TH, gates[LAYERS[0]]), rtol=1e-4, atol=1e-4)


def test_time_spent_waiting_for_sums_is_counted(
    checkpoint: Checkpoint, gates: dict[int, GateWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = routed_over(checkpoint, gates, place_evenly(LAYERS, NUM_EXPERTS, 2))
    dispatched = routed.dispatch(1, torch.randn(NUM_TOKENS, HIDDEN_SIZE))
    assert routed.combine_s == 0
    readings_s = iter([10.0, 10.25])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings_s))
    routed.combine(dispatched)
    assert routed.combine_s == 0.25


class Crowded(LocalExchange):
    """Shards that keep every core at work, as far as this one says."""

    def __init__(self) -> None:
        super().__init__([lambda layer, rows: torch.zeros_like(rows.x_UH)])
        self.crowded = True
        self.num_awaited = 0

    def await_first(self, ticket: Ticket) -> None:
        self.num_awaited += 1


@pytest.mark.parametrize(
    ("num_tokens", "gives_way", "competes", "awaits"),
    [
        (FEW_TOKENS + 1, False, False, True),
        (FEW_TOKENS, False, False, False),
        (FEW_TOKENS + 1, True, False, False),
        (FEW_TOKENS + 1, False, True, False),
    ],
)
def test_many_rows_leave_the_cores_to_shards_but_not_to_others(
    checkpoint: Checkpoint,
    gates: dict[int, GateWeights],
    num_tokens: int,
    gives_way: bool,
    competes: bool,
    awaits: bool,
) -> None:
    exchange, routed = Crowded(), RoutedExperts(checkpoint.config, gates, lambda: competes)
    exchange.gives_way = gives_way
    routed.adopt(Planner(place_evenly(LAYERS, NUM_EXPERTS, 1), CPU), exchange)
    assert routed.crowded == (not competes)
    routed.combine(routed.dispatch(1, torch.randn(num_tokens, HIDDEN_SIZE)))
    assert exchange.num_awaited == int(awaits)


def test_time_spent_waiting_for_the_first_shard_is_counted(
    checkpoint: Checkpoint, gates: dict[int, GateWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = RoutedExperts(checkpoint.config, gates)
    routed.adopt(Planner(place_evenly(LAYERS, NUM_EXPERTS, 1), CPU), Crowded())
    x_TH = torch.randn(FEW_TOKENS + 1, HIDDEN_SIZE)
    plan = routed.plan(1, x_TH)
    readings_s = iter([10.0, 10.25, 20.0, 20.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(readings_s))
    dispatched = routed.send(1, x_TH, plan, torch.zeros_like(x_TH))
    assert routed.combine_s == 0.25
    routed.combine(dispatched)
    assert routed.combine_s == 0.75


class Lost(LocalExchange):
    """A lane that has lost a shard."""

    def __init__(self) -> None:
        super().__init__([lambda layer, rows: torch.zeros_like(rows.x_UH)])
        self.asked: list[str] = []

    def receive(self, ticket: Ticket, y_TH: torch.Tensor) -> None:
        assert len(self.asked) < len(LAYERS), "it is asked again and again"
        self.asked.append(f"layer {ticket.layer}")
        raise PeerLostError("shard 0: gone")

    def settle(self) -> None:
        self.asked.append("settle")
        raise PeerLostError("shard 0: gone")


def test_what_is_under_way_over_a_lane_that_broke_is_dropped_and_the_next_lane_works(
    checkpoint: Checkpoint, gates: dict[int, GateWeights]
) -> None:
    placement, lost = place_evenly(LAYERS, NUM_EXPERTS, 2), Lost()
    whole = routed_over(checkpoint, gates, placement)
    assert whole._exchange is not None
    routed, x_TH = RoutedExperts(checkpoint.config, gates), torch.randn(NUM_TOKENS, HIDDEN_SIZE)
    routed.adopt(Planner(place_evenly(LAYERS, NUM_EXPERTS, 1), CPU), lost)
    first, _ = (routed.dispatch(layer, x_TH) for layer in LAYERS)
    with pytest.raises(PeerLostError):
        routed.combine(first)
    routed.drain()
    assert lost.asked == ["layer 1", "layer 2", "settle"]
    routed.adopt(Planner(placement, CPU), whole._exchange)
    y_TH = routed.combine(routed.dispatch(LAYERS[0], x_TH))
    torch.testing.assert_close(y_TH, dense(checkpoint, LAYERS[0], x_TH, gates[LAYERS[0]]), rtol=1e-4, atol=1e-4)


def test_what_was_captured_for_other_shards_is_not_used_any_more(
    checkpoint: Checkpoint, gates: dict[int, GateWeights]
) -> None:
    routed, generations = RoutedExperts(checkpoint.config, gates), set()
    for num_shards in (1, 2, 1):
        routed.adopt(Planner(place_evenly(LAYERS, NUM_EXPERTS, num_shards), CPU), Lost())
        generations.add(routed.generation)
    assert len(generations) == 3
