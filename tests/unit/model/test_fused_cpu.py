"""Attention of single tokens over their pages, of heads that are more and wider than a register tile."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from model.fused_cpu import decode_attention
from model.tiles_cpu import COLUMNS, MAX_ROWS

pytestmark = pytest.mark.usefixtures("fresh_seed")

NUM_PAGES, PAGE_SIZE = 60, 16
LENGTHS = [1, 15, 16, 17, 31, 33, 300]
HEADS = [(4, 2, 16), (2 * MAX_ROWS + 1, 1, 2 * COLUMNS), (2 * (MAX_ROWS + 3), 2, COLUMNS + 20), (3, 3, COLUMNS + 5)]


class Sequences:
    """Of so many positions, with pages from anywhere, and a query of each."""

    def __init__(self, num_q: int, num_kv: int, dim: int) -> None:
        self.q_BQD = torch.randn(len(LENGTHS), num_q, dim)
        self.k, self.v = torch.randn(2, NUM_PAGES * PAGE_SIZE, num_kv, dim)
        self.group, self.lengths_B = num_q // num_kv, torch.tensor(LENGTHS)
        numbers = random.sample(range(NUM_PAGES), NUM_PAGES)
        pages = [[numbers.pop() for _ in range(-(-length // PAGE_SIZE))] for length in LENGTHS]
        self.pages_BP = torch.tensor([[*some, *[0] * (-(-max(LENGTHS) // PAGE_SIZE) - len(some))] for some in pages])

    def attend(self, scale: float) -> torch.Tensor:
        return decode_attention(self.q_BQD, self.k, self.v, self.pages_BP, self.lengths_B, PAGE_SIZE, scale)

    def expected(self, scale: float) -> torch.Tensor:
        found = []
        for q_QD, pages_P, length in zip(self.q_BQD, self.pages_BP, LENGTHS, strict=True):
            slots = (pages_P[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()[:length]
            k, v = (x[slots].double().repeat_interleave(self.group, 1).transpose(0, 1) for x in (self.k, self.v))
            out_Q1D = F.scaled_dot_product_attention(q_QD.double().unsqueeze(1), k, v, scale=scale)
            found.append(out_Q1D.squeeze(1).float())
        return torch.stack(found)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_token_attends_to_all_its_positions(heads: tuple[int, int, int]) -> None:
    sequences = Sequences(*heads)
    torch.testing.assert_close(sequences.attend(0.3), sequences.expected(0.3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_any_size_stay_finite(sign: int) -> None:
    """Also where all are far below zero, or far above: what counts is how far apart they are."""
    sequences = Sequences(4, 2, 16)
    sequences.k[..., 0], sequences.q_BQD[..., 0] = 1000.0, float(sign)
    torch.testing.assert_close(sequences.attend(1.0), sequences.expected(1.0), rtol=1e-3, atol=1e-3)
