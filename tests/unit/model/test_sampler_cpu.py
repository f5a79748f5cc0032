"""The compiled choice of tokens against the operators that GPUs have, which are held to `transformers`."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch

from model.sampler import SampleRow, filtered_probabilities, sample, sample_by_operators
from model.sampler_cpu import _BINS, draw
from octet.request import Output, Sampling, Stopping

pytestmark = pytest.mark.usefixtures("fresh_seed")

Row = npt.NDArray[np.float32]


def drawn(logits_V: torch.Tensor, sampling: Sampling, point: float) -> tuple[int, Row]:
    """The token, and what was kept."""
    size = len(logits_V)
    p_V, room = np.empty(size, np.float32), np.empty(size, np.float32)
    kept = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    token: int = draw(logits_V.numpy(), *kept, point, p_V, room, np.empty(_BINS, np.int64), np.empty(_BINS))
    return token, p_V


def any_sampling(size: int) -> Sampling:
    return Sampling(
        temperature=random.choice((0.05, 0.7, 1.0, 2.0, 50.0)),
        top_p=random.choice((1.0, 1e-9, random.uniform(0.05, 0.99), 1 - 1e-9, 1 - 2.0**-53)),
        top_k=random.choice((0, 1, random.randint(1, size), size, size + 10)),
        min_p=random.choice((0.0, 1.0, random.uniform(0.001, 0.9))),
    )


def any_logits(size: int) -> torch.Tensor:
    """Also with equals, as numbers in 16 bits have, with some that are masked, of any spread."""
    logits_V = torch.randn(size) * random.choice((0.01, 1.0, 3.0, 30.0))
    if random.random() < 0.4:
        logits_V = (logits_V * 2).round() / 2
    if random.random() < 0.3:
        logits_V[torch.randperm(size)[: random.randint(1, size - 1)]] = -torch.inf
    return logits_V


def decided_by_rounding(logits_V: torch.Tensor, sampling: Sampling) -> bool:
    """Whether fp32 may keep another set: where the least token that is kept and the largest that is not are as good as
    equal, or where one of them lies at the limit of top-p or min-p."""
    kept_V, all_V = (
        filtered_probabilities(logits_V.unsqueeze(0), [each])[0].sort(descending=True).values
        for each in (sampling, dataclasses.replace(sampling, top_p=1.0, min_p=0.0))
    )
    num_kept = int(kept_V.count_nonzero())
    if num_kept == len(all_V) or all_V[num_kept] < 1e-6:
        return False
    edge = all_V[num_kept - 1 : num_kept + 1]
    before, ratio = (all_V.cumsum(0) - all_V)[max(num_kept - 1, 1) : num_kept + 1], edge / all_V[0]
    near_equals = 0 < edge[0] - edge[1] < 1e-5 * edge[1]
    near_min_p = ((ratio - sampling.min_p).abs() < 1e-6) & (ratio != sampling.min_p)
    return bool(near_equals or ((before - sampling.top_p).abs() < 1e-7).any() or near_min_p.any())


@pytest.mark.parametrize("size", [2, 17, 256, 257, 5000])
def test_what_is_kept_is_what_the_operators_keep(size: int) -> None:
    for _ in range(100):
        logits_V, sampling, point = any_logits(size), any_sampling(size), random.random()
        if decided_by_rounding(logits_V, sampling):
            continue
        expected_V = filtered_probabilities(logits_V.unsqueeze(0), [sampling])[0]
        token, p_V = drawn(logits_V, sampling, point)
        print(sampling)
        found_V = torch.from_numpy(p_V).double()
        found_V /= found_V.sum()
        torch.testing.assert_close(found_V, expected_V, rtol=1e-4, atol=2e-6)
        # The same token, but for the rounding of the sums: the point lies within its part.
        after = float(expected_V[: token + 1].sum())
        assert after - float(expected_V[token]) - 1e-5 <= point <= after + 1e-5
        assert expected_V[token] > 0


@pytest.mark.parametrize("size", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2.0**-53])
def test_at_the_ends_of_a_block_one_that_is_kept_is_drawn(size: int, point: float) -> None:
    for _ in range(50):
        logits_V = torch.full((size,), -torch.inf)
        possible = sorted(random.sample(range(size), random.randint(1, min(size, 4))))
        logits_V[possible] = torch.randn(len(possible))
        token, _ = drawn(logits_V, any_sampling(size), point)
        assert token in possible


def test_of_equals_the_first_are_kept() -> None:
    logits_V = torch.zeros(1000)
    _, p_V = drawn(logits_V, Sampling(temperature=1.0, top_p=0.3), 0.5)
    assert p_V.nonzero()[0].tolist() == list(range(300))
    assert filtered_probabilities(logits_V.unsqueeze(0), [Sampling(temperature=1.0, top_p=0.3)])[0].count_nonzero() in (
        300,
        301,
    )


@pytest.mark.parametrize("choose", [sample, sample_by_operators])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-30, 1e-9])
def test_next_to_no_temperature_the_most_likely_token_is_drawn(
    choose: Callable[[torch.Tensor, Sequence[SampleRow]], list[int]], temperature: float
) -> None:
    logits_BV = 3 * torch.randn(20, 300)
    sampling = Sampling(temperature=temperature, top_p=random.choice((0.9, 1.0)), seed=random.getrandbits(63))
    row = SampleRow(
        sampling=sampling,
        stopping=Stopping(max_new_tokens=9),
        output=Output(),
        choice=0,
        token_ids=[1],
        num_prompt_tokens=1,
    )
    assert choose(logits_BV, [row] * 20) == logits_BV.argmax(-1).tolist()
