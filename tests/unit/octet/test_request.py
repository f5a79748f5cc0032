"""When a choice ends by its token ids."""

from __future__ import annotations

import pytest
import torch
from transformers import MinNewTokensLengthLogitsProcessor

from octet.request import Stopping

STOP = 3


@pytest.mark.parametrize("minimum", [0, 1, 2, 5])
def test_stop_ids_are_masked_as_long_as_they_are_in_transformers(minimum: int) -> None:
    stopping, prompt = Stopping(max_new_tokens=9, min_new_tokens=minimum, stop_token_ids=(STOP,)), [7, 8]
    theirs = MinNewTokensLengthLogitsProcessor(len(prompt), minimum, [STOP], device="cpu")
    for num_new_tokens in range(8):
        scores_1V = theirs(torch.tensor([prompt + [1] * num_new_tokens]), torch.zeros(1, 10))
        masked = (scores_1V[0] == -torch.inf).nonzero()[:, 0].tolist()
        assert list(stopping.masked_ids(num_new_tokens)) == masked


def test_a_stop_id_ends_a_choice_with_the_first_token_behind_the_minimum() -> None:
    stopping = Stopping(max_new_tokens=9, min_new_tokens=2, stop_token_ids=(STOP,))
    assert [stopping.finish_reason(STOP, count) for count in (1, 2, 3)] == [None, None, "stop"]


def test_a_choice_whose_minimum_is_its_maximum_ends_by_its_length() -> None:
    stopping = Stopping(max_new_tokens=2, min_new_tokens=2, stop_token_ids=(STOP,))
    assert [stopping.finish_reason(STOP, count) for count in (1, 2)] == [None, "length"]
