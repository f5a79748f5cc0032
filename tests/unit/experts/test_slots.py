from __future__ import annotations

import json
import mmap
import pathlib
import random
from collections.abc import Iterable, Mapping

import pytest
import torch
from safetensors.torch import save_file

from experts.memory import SlotMemory
from experts.slots import EMPTY, ExpertSlots, Fill
from model.census import expert_tensors, required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from model.linear import PackedMatrix
from model.load_progress import LoadProgress

NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE = 6, 16, 32
EXPERT_BYTES = 3 * HIDDEN_SIZE * INTERMEDIATE_SIZE * 4


@pytest.fixture
def checkpoint(tmp_path: pathlib.Path) -> Checkpoint:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    fields = {
        "architectures": ["Glm4MoeForCausalLM"],
        "vocab_size": 10,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 8,
        "moe_intermediate_size": INTERMEDIATE_SIZE,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": NUM_EXPERTS,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = required_tensors(read_config(tmp_path))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


def load(checkpoint: Checkpoint, held: Mapping[int, list[int]], progress: LoadProgress | None = None) -> ExpertSlots:
    return ExpertSlots(checkpoint, held, torch.float32, torch.device("cpu"), progress)


def holds(checkpoint: Checkpoint, slots: ExpertSlots, layer: int, slot: int, expert: int) -> bool:
    gate, up, down = checkpoint.read(expert_tensors(checkpoint.config, layer, expert), torch.float32).values()
    gate_up = unpacked(slots.gate_up[layer][slot], 2 * INTERMEDIATE_SIZE)
    return gate_up.equal(torch.cat((gate, up))) and unpacked(slots.down[layer][slot], HIDDEN_SIZE).equal(down)


def unpacked(panels: torch.Tensor, columns: int) -> torch.Tensor:
    return PackedMatrix(panels, columns).rows(torch.arange(columns))


def test_each_slot_holds_its_expert(checkpoint: Checkpoint) -> None:
    held = {1: [4, EMPTY, 0], 2: [5, 2, 3]}
    slots = load(checkpoint, held)
    assert all(
        holds(checkpoint, slots, layer, slot, expert)
        for layer, experts in held.items()
        for slot, expert in enumerate(experts)
        if expert != EMPTY
    )


def test_every_replica_of_an_expert_in_one_shard_is_filled(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {1: [3, 5, 3, EMPTY, 3]})
    assert [holds(checkpoint, slots, 1, slot, 3) for slot in (0, 2, 4)] == [True] * 3


def test_only_held_experts_are_read(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    read = Checkpoint.read

    def noted(self: Checkpoint, names: Iterable[str], *args: object, **kwargs: object) -> object:
        asked.extend(names)
        return read(self, names, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoint, "read", noted)
    load(checkpoint, {1: [4, EMPTY], 2: [0, 2]})
    expected = [
        name for layer, expert in ((1, 4), (2, 0), (2, 2)) for name in expert_tensors(checkpoint.config, layer, expert)
    ]
    assert sorted(asked) == sorted(expected)


def test_an_expert_held_twice_is_read_once(checkpoint: Checkpoint) -> None:
    progress = LoadProgress(0.0)
    load(checkpoint, {1: [4, 4]}, progress)
    assert progress.snapshot(1.0).bytes_done == EXPERT_BYTES


def test_only_as_many_slots_are_allocated_as_the_shard_has(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {2: [1, 5]})
    assert slots.gate_up.keys() == slots.down.keys() == {2}
    assert slots.gate_up[2].nbytes + slots.down[2].nbytes == 2 * EXPERT_BYTES


def test_empty_slots_weigh_nothing(checkpoint: Checkpoint) -> None:
    assert load(checkpoint, {1: [4, EMPTY, EMPTY], 2: [EMPTY, 2, 3]}).weight_bytes() == 3 * EXPERT_BYTES


def test_the_number_of_slots_is_that_of_a_layer(checkpoint: Checkpoint) -> None:
    assert load(checkpoint, {1: [4, EMPTY, 0], 2: [5, 2, EMPTY]}).num_slots == 3


def test_a_shard_without_layers_has_no_slots(checkpoint: Checkpoint) -> None:
    assert load(checkpoint, {}).num_slots == 0


def test_weights_take_the_dtype_asked_for(checkpoint: Checkpoint) -> None:
    slots = ExpertSlots(checkpoint, {1: [0]}, torch.bfloat16, torch.device("cpu"))
    assert (slots.gate_up[1].dtype, slots.down[1].dtype) == (torch.bfloat16, torch.bfloat16)
    assert not slots.packed


def test_an_empty_slot_can_be_filled_later(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {1: [4, EMPTY, EMPTY], 2: [EMPTY] * 3})
    slots.fill([Fill(layer=1, slot=2, expert=0), Fill(layer=2, slot=1, expert=5)])
    assert (slots.held(1), slots.held(2)) == ((4, EMPTY, 0), (EMPTY, 5, EMPTY))
    assert holds(checkpoint, slots, 1, 2, 0)
    assert holds(checkpoint, slots, 2, 1, 5)
    assert slots.holds[1].tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_slot_can_be_filled_with_what_another_shard_holds(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    theirs = ExpertSlots(checkpoint, {1: [3, 5]}, dtype, torch.device("cpu"))
    ours = ExpertSlots(checkpoint, {1: [EMPTY, EMPTY, 2]}, dtype, torch.device("cpu"))
    exported = theirs.export(1, 5)
    assert exported is not None
    ours.adopt(Fill(layer=1, slot=0, expert=5), *(part.reshape(-1).clone() for part in exported))
    assert ours.held(1) == (5, EMPTY, 2)
    assert ours.gate_up[1][0].equal(theirs.gate_up[1][1])
    assert ours.down[1][0].equal(theirs.down[1][1])


def test_weights_of_another_shape_are_not_taken(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {1: [EMPTY]})
    with pytest.raises(ValueError, match="an expert of 3 numbers in a slot of"):
        slots.adopt(Fill(layer=1, slot=0, expert=5), torch.zeros(3), torch.zeros(3))
    assert slots.held(1) == (EMPTY,)


def test_an_expert_that_is_not_held_cannot_be_exported(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {1: [4]})
    assert slots.export(1, 3) is None
    assert slots.export(2, 4) is None


def test_a_released_slot_is_empty_and_its_neighbours_are_as_they_were(checkpoint: Checkpoint) -> None:
    slots = load(checkpoint, {1: [4, 2, 0]})
    slots.release(1, 1)
    assert slots.held(1) == (4, EMPTY, 0)
    assert slots.weight_bytes() == 2 * EXPERT_BYTES
    assert holds(checkpoint, slots, 1, 0, 4)
    assert holds(checkpoint, slots, 1, 2, 0)


def test_memory_that_is_released_is_given_back_and_reads_as_zeros() -> None:
    memory = SlotMemory((4, 1024, 1024))
    before = resident_bytes()
    memory.weights[1:3] = 1.0
    filled = resident_bytes()
    memory.release(1)
    assert filled - before > 7 * 2**20
    assert filled - resident_bytes() > 3 * 2**20
    assert not memory.weights[1].any()
    assert memory.weights[2].all()


def resident_bytes() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE
