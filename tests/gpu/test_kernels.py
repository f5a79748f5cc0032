"""What the kernels compute is what is computed without them, in higher precision.

Without a GPU Triton interprets them: fewer rows then, and no bf16, which its interpreter's products do not know.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from experts.grouped import count_slots, grouped_gpu, grouped_swiglu
from model.attention import attention_gpu

pytest.importorskip("triton", reason="Triton is not installed, and there may be no GPU")

COMPILED = torch.cuda.is_available()
DEVICE = torch.device("cuda" if COMPILED else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16 if COMPILED else torch.float16: 1.5e-2 if COMPILED else 2e-3}
LARGE = (
    [(300, 9, 1024, 512), (2000, 16, 512, 256), (6000, 3, 256, 128)]
    if COMPILED
    else [(60, 2, 64, 40), (250, 2, 64, 40)]
)
LONG = [([5000, 3, 777], 96, 8, 128), ([130] * 40, 12, 1, 40)] if COMPILED else [([130] * 4, 12, 1, 40)]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_slots", "hidden", "intermediate"),
    [(1, 1, 128, 32), (7, 6, 128, 32), (40, 5, 72, 40), *LARGE],
)
def test_the_weighted_sums_of_experts(
    num_rows: int, num_slots: int, hidden: int, intermediate: int, dtype: torch.dtype
) -> None:
    """Of rows that ask for a few slots, for none, and all for the same."""
    top_k = min(8, num_slots)
    x_UH = torch.randn(num_rows, hidden, dtype=dtype, device=DEVICE)
    slots_UK = torch.rand(num_rows, num_slots, device=DEVICE).topk(top_k).indices.int()
    slots_UK[torch.rand(slots_UK.shape, device=DEVICE) < 0.3] = -1
    slots_UK[: num_rows // 3] = slots_UK[0]
    weights_UK = torch.rand(slots_UK.shape, device=DEVICE)
    gate_up = (torch.randn(num_slots, 2 * intermediate, hidden, device=DEVICE) * hidden**-0.5).to(dtype)
    down = (torch.randn(num_slots, hidden, intermediate, device=DEVICE) * intermediate**-0.5).to(dtype)
    counters = grouped_gpu().slot_counters(num_slots, DEVICE)
    holds_S = torch.ones(num_slots, dtype=torch.uint8, device=DEVICE)
    counts_S = count_slots(slots_UK, num_slots)
    expected_UH = grouped_swiglu(x_UH.float(), slots_UK, weights_UK, gate_up.float(), down.float(), counts_S)
    arguments = (x_UH, slots_UK, weights_UK, gate_up, down, holds_S, counters)
    found_UH = grouped_gpu().grouped_swiglu(*arguments)
    if counts_S.any():
        assert relative_error(found_UH, expected_UH) < TOLERANCE[dtype]
    else:
        assert not found_UH.any()
    assert torch.equal(found_UH, grouped_gpu().grouped_swiglu(*arguments)), "the same again, bit for bit"
    assert counters.served_S.tolist() == (2 * counts_S).tolist()
    assert int(counters.activated) == 2 * int((counts_S > 0).sum())


def test_a_slot_that_holds_nothing_makes_all_of_the_answer_nan() -> None:
    gate_up, down = torch.randn(4, 64, 32, device=DEVICE), torch.randn(4, 32, 32, device=DEVICE)
    holds_S = torch.tensor([1, 1, 0, 1], dtype=torch.uint8, device=DEVICE)
    x_UH, weights_UK = torch.randn(3, 32, device=DEVICE), torch.ones(3, 2, device=DEVICE)
    counters = grouped_gpu().slot_counters(4, DEVICE)
    for slots, whole in (([[0, 1], [3, -1], [1, 0]], True), ([[0, 1], [2, -1], [1, 0]], False), ([[0, 4]] * 3, False)):
        slots_UK = torch.tensor(slots, dtype=torch.int32, device=DEVICE)
        y_UH = grouped_gpu().grouped_swiglu(x_UH, slots_UK, weights_UK, gate_up, down, holds_S, counters)
        assert bool(y_UH.isfinite().all()) == whole
        assert bool(y_UH.isnan().all()) != whole


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("lengths", "num_q", "num_kv", "head_dim"),
    [([1], 8, 2, 32), ([0, 1, 65, 64, 300], 8, 2, 32), *LONG],
)
def test_attention_over_pages(lengths: list[int], num_q: int, num_kv: int, head_dim: int, dtype: torch.dtype) -> None:
    page_size, widest = 16, max(lengths) // 16 + 3
    num_pages = len(lengths) * widest + 5
    k, v = (torch.randn(num_pages * page_size, num_kv, head_dim, dtype=dtype, device=DEVICE) for _ in range(2))
    pages_BP = torch.randperm(num_pages, device=DEVICE)[: len(lengths) * widest].view(len(lengths), widest).int()
    q_BQD = torch.randn(len(lengths), num_q, head_dim, dtype=dtype, device=DEVICE)
    out_BQD = attention_gpu().decode_attention(
        q_BQD, k, v, pages_BP, torch.tensor(lengths, device=DEVICE), page_size, head_dim**-0.5
    )
    for index, length in enumerate(lengths):
        position = torch.arange(length, device=DEVICE)
        slots = pages_BP[index].long()[position // page_size] * page_size + position % page_size
        if length == 0:
            assert not out_BQD[index].any()
            continue
        expected_NGD = F.scaled_dot_product_attention(
            q_BQD[index].view(num_kv, -1, head_dim).double(),
            k[slots].transpose(0, 1).double(),
            v[slots].transpose(0, 1).double(),
        )
        assert relative_error(out_BQD[index], expected_NGD.reshape(num_q, head_dim)) < TOLERANCE[dtype]
