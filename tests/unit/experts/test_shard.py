from __future__ import annotations

import json
import pathlib
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experts.grouped import count_slots, grouped_swiglu
from experts.shard import ExpertShard
from experts.slots import EMPTY, ExpertSlots, Fill
from model import threads
from model.census import expert_tensors, required_tensors
from model.checkpoint import Checkpoint
from model.config import read_config
from octet.errors import ExpertMissingError
from router.exchange import ExpertRows

HIDDEN_SIZE = 16
HELD = {1: [4, EMPTY, 0], 2: [5, 2, 3]}


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
        "moe_intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "num_nextn_predict_layers": 0,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shapes = required_tensors(read_config(tmp_path))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return Checkpoint.open(tmp_path)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["packed", "stacked"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """fp32 is packed for the kernel on this CPU, anything else goes through torch's operators."""
    dtype: torch.dtype = request.param
    return dtype


@pytest.fixture
def shard(checkpoint: Checkpoint, dtype: torch.dtype) -> ExpertShard:
    return ExpertShard(ExpertSlots(checkpoint, HELD, dtype, torch.device("cpu")))


class Pauses:
    """Due behind every piece, or never."""

    def __init__(self, pause: Callable[[], None], *, due: bool = True) -> None:
        self.due, self._pause = np.full(1, due, np.int64), pause

    def __call__(self) -> None:
        self._pause()


def asking_for(*slots: Sequence[int], dtype: torch.dtype = torch.float32) -> ExpertRows:
    return ExpertRows(
        x_UH=torch.randn(len(slots), HIDDEN_SIZE).to(dtype),
        slots_UK=torch.tensor(slots, dtype=torch.int32),
        weights_UK=torch.rand(len(slots), len(slots[0])) + 0.1,
    )


def test_rows_are_served_from_the_slots_of_their_layer(
    checkpoint: Checkpoint, shard: ExpertShard, dtype: torch.dtype
) -> None:
    rows = asking_for([0, 2], [-1, 1], [1, 0], dtype=dtype)
    experts = [
        checkpoint.read(expert_tensors(checkpoint.config, 2, expert), torch.float32).values() for expert in HELD[2]
    ]
    gate_up = torch.stack([torch.cat((gate, up)) for gate, up, _ in experts])
    down = torch.stack([down for _, _, down in experts])
    expected = grouped_swiglu(
        rows.x_UH.float(), rows.slots_UK, rows.weights_UK, gate_up, down, count_slots(rows.slots_UK, 3)
    )
    torch.testing.assert_close(shard.serve(2, rows).float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str, indirect=True)
def test_the_answer_has_the_dtype_of_the_rows(shard: ExpertShard, dtype: torch.dtype) -> None:
    assert shard.serve(2, asking_for([0, 2], dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_long_computation_pauses_and_meanwhile_others_are_served(
    checkpoint: Checkpoint, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = ExpertShard(ExpertSlots(checkpoint, HELD, torch.float32, torch.device("cpu")))
    long, short = asking_for(*[[0, 2], [1, -1], [2, 1]] * 8), asking_for([1, 0])
    whole, other = shard.serve(2, long), shard.serve(2, short)
    monkeypatch.setattr("experts.shard.PIECE_OPERATIONS", 4 * HIDDEN_SIZE * 8)
    monkeypatch.setattr("experts.shard.num_threads", lambda: num_threads)
    others: list[torch.Tensor] = []
    pieces = shard.serve(2, long, None, Pauses(lambda: others.append(shard.serve(2, short))))
    assert len(others) == 2
    torch.testing.assert_close(pieces, whole, rtol=0, atol=0)
    for found in others:
        torch.testing.assert_close(found, other, rtol=0, atol=0)
    assert shard.counts()[2].sum() == 2 * 40 + 3 * 2


@pytest.mark.parametrize("num_threads", [1, 2])
def test_there_is_no_pause_where_none_is_due(
    checkpoint: Checkpoint, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = ExpertShard(ExpertSlots(checkpoint, HELD, torch.float32, torch.device("cpu")))
    monkeypatch.setattr("experts.shard.PIECE_OPERATIONS", 4 * HIDDEN_SIZE * 8)
    monkeypatch.setattr("experts.shard.num_threads", lambda: num_threads)
    rows, pauses = asking_for(*[[0, 2], [1, -1], [2, 1]] * 8), list[int]()
    served = shard.serve(2, rows, None, Pauses(lambda: pauses.append(1), due=False))
    torch.testing.assert_close(served, shard.serve(2, rows), rtol=0, atol=0)
    assert not pauses


def test_what_need_not_pause_is_one_call_however_long(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = ExpertShard(ExpertSlots(checkpoint, HELD, torch.float32, torch.device("cpu")))
    monkeypatch.setattr("experts.shard.PIECE_OPERATIONS", 4 * HIDDEN_SIZE * 8)
    monkeypatch.setattr("experts.shard.num_threads", lambda: 1)
    rows = asking_for(*[[0, 2], [1, -1], [2, 1]] * 8)
    pieces = shard.serve(2, rows, None, Pauses(lambda: None))
    monkeypatch.delattr(ExpertShard, "_share_rows")
    torch.testing.assert_close(shard.serve(2, rows), pieces, rtol=0, atol=0)
    # Both ways count alike.
    assert shard.counts()[2].tolist() == [2 * count for count in (0, 0, 16, 16, 0, 8)]
    assert shard.num_activated == 2 * 3


def test_an_empty_slot_is_an_error_and_never_zeros(shard: ExpertShard, dtype: torch.dtype) -> None:
    with pytest.raises(ExpertMissingError, match=r"layer 1: no expert in slot 1 of 3"):
        shard.serve(1, asking_for([0, 2], [-1, 1], dtype=dtype))


def test_a_slot_beyond_the_last_is_an_error(shard: ExpertShard, dtype: torch.dtype) -> None:
    with pytest.raises(ExpertMissingError, match=r"layer 2: no expert in slot 3 of 3"):
        shard.serve(2, asking_for([0, 3], dtype=dtype))


def test_a_layer_that_the_shard_lacks_is_an_error(shard: ExpertShard, dtype: torch.dtype) -> None:
    with pytest.raises(ExpertMissingError, match=r"layer 3: this shard holds layers \[1, 2\]"):
        shard.serve(3, asking_for([0, 1], dtype=dtype))


def test_an_empty_slot_beside_the_ones_asked_for_does_no_harm(shard: ExpertShard, dtype: torch.dtype) -> None:
    assert shard.serve(1, asking_for([0, 2], [2, -1], dtype=dtype)).isfinite().all()


def test_tokens_are_counted_by_layer_and_logical_expert(shard: ExpertShard, dtype: torch.dtype) -> None:
    shard.serve(1, asking_for([0, 2], [2, -1], dtype=dtype))
    shard.serve(2, asking_for([0, 2], dtype=dtype))
    shard.serve(2, asking_for([1, 2], [2, 0], dtype=dtype))
    counts = shard.counts()
    assert {layer: counted.tolist() for layer, counted in counts.items()} == {
        1: [2, 0, 0, 0, 1, 0],
        2: [0, 0, 1, 3, 0, 2],
    }


def test_what_a_slot_served_stays_counted_when_its_expert_leaves(shard: ExpertShard, dtype: torch.dtype) -> None:
    shard.serve(2, asking_for([0, 2], [2, 1], dtype=dtype))
    before = shard.counts()[2].tolist()
    shard.release(2, 2)
    assert shard.counts()[2].tolist() == before
    with pytest.raises(ExpertMissingError, match=r"layer 2: no expert in slot 2"):
        shard.serve(2, asking_for([0, 2], dtype=dtype))


def test_an_expert_that_comes_into_a_slot_begins_at_0(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """What the slot served before is another expert's: counted for both, it would move experts after the wrong load."""
    slots = ExpertSlots(checkpoint, HELD, dtype, torch.device("cpu"))
    shard = ExpertShard(slots)
    shard.serve(2, asking_for([0, 2], [2, 1], dtype=dtype))
    before = shard.counts()[2]
    for expert in (0, 4, 3):
        shard.release(2, 2)
        slots.fill([Fill(layer=2, slot=2, expert=expert)])
        assert shard.counts()[2].tolist() == before.tolist()
        shard.serve(2, asking_for([2, -1], dtype=dtype))
        before[expert] += 1
    assert shard.counts()[2].tolist() == before.tolist()


def test_whoever_reads_the_counts_while_slots_are_emptied_sees_every_row_once(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    held = [slot % 6 for slot in range(600)]
    shard = ExpertShard(ExpertSlots(checkpoint, {1: held}, dtype, torch.device("cpu")))
    shard.serve(1, asking_for(*([slot] for slot in range(len(held))), dtype=dtype))
    expected, interval_s = shard.counts()[1].tolist(), sys.getswitchinterval()

    def empty() -> None:
        for slot in range(len(held)):
            shard.release(1, slot)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as pool:
            emptying = pool.submit(empty)
            seen = {tuple(shard.counts()[1]) for _ in iter(emptying.done, True)}
        emptying.result()
    finally:
        sys.setswitchinterval(interval_s)
    assert seen | {tuple(shard.counts()[1])} == {tuple(expected)}


def test_rows_are_counted_once_however_many_experts_they_use(shard: ExpertShard, dtype: torch.dtype) -> None:
    shard.serve(1, asking_for([0, 2], [2, -1], dtype=dtype))
    assert shard.num_rows == 2


def test_experts_hit_are_counted_once_per_call(shard: ExpertShard, dtype: torch.dtype) -> None:
    shard.serve(2, asking_for([0, 2], [2, 0], [-1, 2], dtype=dtype))
    shard.serve(2, asking_for([1, 2], dtype=dtype))
    assert shard.num_activated == 4


def test_a_refused_call_counts_nothing(shard: ExpertShard, dtype: torch.dtype) -> None:
    with pytest.raises(ExpertMissingError):
        shard.serve(1, asking_for([0, 1], dtype=dtype))
    assert shard.num_rows == shard.num_activated == 0
    assert not shard.counts()[1].any()


def test_counts_are_a_copy(shard: ExpertShard) -> None:
    shard.counts()[1][0] = 99
    assert shard.counts()[1][0] == 0


def test_several_threads_serve_what_one_does(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PART_OPERATIONS", 1)
    """Bit for bit: what a row gets does not depend on who shares the call."""
    slots = [random.sample(range(-1, 3), k=2) for _ in range(random.randint(1, 40))]
    before, rows = torch.get_num_threads(), asking_for([2, 0], *slots)
    served = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            shard = ExpertShard(ExpertSlots(checkpoint, HELD, torch.float32, torch.device("cpu")))
            served.append((shard.serve(2, rows), shard.counts()[2].tolist()))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(served[1][0], served[0][0])
    assert served[1][1] == served[0][1]
