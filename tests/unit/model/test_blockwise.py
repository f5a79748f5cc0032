from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from model import blockwise
from model.blockwise import attend, merge

NUM_Q, NUM_KV, HEAD_DIM, SCALE = 6, 2, 16, 0.3


def keys(num_tokens: int) -> torch.Tensor:
    return torch.randn(num_tokens, NUM_KV, HEAD_DIM)


def expected(q_TQD: torch.Tensor, k_SND: torch.Tensor, v_SND: torch.Tensor, num_before: int | None) -> torch.Tensor:
    """All keys at once. Query t sees the first `num_before + t + 1` of them, or all."""
    mask = None
    if num_before is not None:
        mask = torch.ones(len(q_TQD), len(k_SND), dtype=torch.bool).tril(num_before)
    k, v = (x.repeat_interleave(NUM_Q // NUM_KV, dim=1).transpose(0, 1) for x in (k_SND, v_SND))
    return F.scaled_dot_product_attention(q_TQD.transpose(0, 1), k, v, attn_mask=mask, scale=SCALE).transpose(0, 1)


@pytest.fixture(params=["kernel", "definition"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A device without a kernel is played by one that is told so."""
    if request.param == "definition":
        monkeypatch.setattr(
            torch.ops.aten,
            "_scaled_dot_product_flash_attention_for_cpu",
            lambda q, k, v, dropout, causal, scale: blockwise._attend_by_definition(q, k, v, causal, scale),
        )
    return str(request.param)


@pytest.mark.parametrize("num_queries", [1, 2, 17, 300])
def test_queries_see_their_own_positions_causally(way: str, num_queries: int) -> None:
    q, k, v = torch.randn(num_queries, NUM_Q, HEAD_DIM), keys(num_queries), keys(num_queries)
    torch.testing.assert_close(attend(q, k, v, causal=True, scale=SCALE).out_TQD, expected(q, k, v, 0))


def test_queries_see_all_that_lies_before_them(way: str) -> None:
    q, k, v = torch.randn(5, NUM_Q, HEAD_DIM), keys(70), keys(70)
    torch.testing.assert_close(attend(q, k, v, causal=False, scale=SCALE).out_TQD, expected(q, k, v, None))


def test_parts_of_any_size_make_the_whole(way: str) -> None:
    num_queries, num_before = random.randint(1, 40), random.randint(1, 200)
    q = torch.randn(num_queries, NUM_Q, HEAD_DIM) * 3
    k, v = keys(num_before + num_queries), keys(num_before + num_queries)
    part = attend(q, k[num_before:], v[num_before:], causal=True, scale=SCALE)
    first = 0
    while first < num_before:
        last = min(num_before, first + random.randint(1, 60))
        part = merge(part, attend(q, k[first:last], v[first:last], causal=False, scale=SCALE))
        first = last
    torch.testing.assert_close(part.out_TQD, expected(q, k, v, num_before))


def test_a_part_of_overwhelming_scores_decides() -> None:
    q = torch.ones(3, NUM_Q, HEAD_DIM)
    k, v = keys(3), keys(3)
    strong = torch.full((4, NUM_KV, HEAD_DIM), 1000.0)
    merged = merge(attend(q, k, v, causal=True, scale=SCALE), attend(q, strong, strong, causal=False, scale=SCALE))
    torch.testing.assert_close(merged.out_TQD, torch.full((3, NUM_Q, HEAD_DIM), 1000.0))


def test_many_parts_in_half_precision_lose_nothing_by_being_many() -> None:
    q, k, v = (torch.randn(n, heads, HEAD_DIM).bfloat16() for n, heads in ((8, NUM_Q), (512, NUM_KV), (512, NUM_KV)))
    part = attend(q, k[:4], v[:4], causal=False, scale=SCALE)
    for first in range(4, 512, 4):
        part = merge(part, attend(q, k[first : first + 4], v[first : first + 4], causal=False, scale=SCALE))
    exact = expected(q.float(), k.float(), v.float(), None)
    assert part.out_TQD.dtype == torch.float32
    torch.testing.assert_close(part.out_TQD, exact, atol=5e-3, rtol=2e-2)
