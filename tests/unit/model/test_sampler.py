from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import model.sampler
import model.sampler_cpu
from model.sampler import (
    NO_TOKEN,
    SampleRow,
    filtered_probabilities,
    logprobs,
    sample,
    sample_by_operators,
    uniform,
)
from octet.request import Output, Sampling, Stopping

pytestmark = pytest.mark.usefixtures("fresh_seed")

VOCAB_SIZE = 40
NUM_DRAWS = 5000
Choose = Callable[[torch.Tensor, Sequence[SampleRow]], list[int]]
either_way = pytest.mark.parametrize("choose", [sample, sample_by_operators])
"""On a CPU, and on other devices."""
PINNED = [0.011546754286331562, 0.37935537747626313, 0.45730466533809355]


def row(
    sampling: Sampling,
    token_ids: Sequence[int] = (),
    num_prompt_tokens: int = 0,
    choice: int = 0,
    stopping: Stopping | None = None,
) -> SampleRow:
    return SampleRow(
        sampling=sampling,
        stopping=stopping or Stopping(max_new_tokens=100),
        output=Output(),
        choice=choice,
        token_ids=token_ids,
        num_prompt_tokens=num_prompt_tokens,
    )


def random_sampling() -> Sampling:
    return Sampling(
        temperature=random.uniform(0.2, 2.0),
        top_p=random.choice((1.0, random.uniform(0.05, 0.99))),
        top_k=random.choice((0, 1, random.randint(2, VOCAB_SIZE), VOCAB_SIZE + 10)),
        min_p=random.choice((0.0, random.uniform(0.01, 0.9))),
        seed=random.randrange(2**63),
    )


# The most likely token


def test_a_greedy_token_is_the_first_of_the_largest() -> None:
    """Of many equals, as logits of a model in 16 bits have, and of rows that are not next to each other in memory."""
    logits_BV = torch.randint(-4, 4, (40, VOCAB_SIZE)).float()[::2]
    rows = [row(Sampling()) for _ in range(len(logits_BV))]
    expected = [values.index(max(values)) for values in logits_BV.tolist()]
    assert sample(logits_BV, rows) == logits_BV.argmax(-1).tolist() == expected


# Logits that are no finite numbers


@either_way
@pytest.mark.parametrize(("value", "num"), [(torch.inf, 1), (torch.nan, 1), (torch.nan, 40), (-torch.inf, 40)])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(presence_penalty=0.5),
        Sampling(temperature=1.0, seed=5),
        Sampling(temperature=1.0, seed=5, top_k=3),
        Sampling(temperature=1.0, seed=5, top_p=0.5, repetition_penalty=1.3),
    ],
    ids=["greedy", "penalised", "drawn", "top-k", "top-p"],
)
def test_a_row_with_any_has_no_token_and_the_others_have_theirs(
    sampling: Sampling, value: float, num: int, choose: Choose
) -> None:
    logits_BV = torch.randn(3, VOCAB_SIZE)
    rows = [row(sampling, [1, 2], 1)] * 3
    expected = choose(logits_BV, rows)
    logits_BV[1, torch.randperm(VOCAB_SIZE)[:num]] = value
    assert choose(logits_BV, rows) == [expected[0], NO_TOKEN, expected[2]]


@either_way
def test_one_that_may_not_come_is_no_reason(choose: Choose) -> None:
    logits_BV = torch.randn(2, VOCAB_SIZE)
    logits_BV[:, : VOCAB_SIZE - 1] = -torch.inf
    assert choose(logits_BV, [row(Sampling()), row(Sampling(temperature=1.0, seed=5))]) == [VOCAB_SIZE - 1] * 2


# The distribution


def test_a_mixed_batch_is_filtered_as_by_the_warpers_of_transformers() -> None:
    samplings = [random_sampling() for _ in range(64)]
    logits_BV = 3 * torch.randn(len(samplings), VOCAB_SIZE)
    expected = torch.cat([warped(logits_V, s) for logits_V, s in zip(logits_BV, samplings, strict=True)])
    torch.testing.assert_close(filtered_probabilities(logits_BV, samplings), expected, rtol=1e-9, atol=1e-12)


def warped(logits_V: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    nothing: Any = torch.empty(1, 0, dtype=torch.long)
    scores: Any = TemperatureLogitsWarper(sampling.temperature)(nothing, logits_V.unsqueeze(0)).double()
    if sampling.top_k > 0:
        scores = TopKLogitsWarper(sampling.top_k)(nothing, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(nothing, scores)
    if sampling.min_p > 0:
        scores = MinPLogitsWarper(sampling.min_p)(nothing, scores)
    probabilities: torch.Tensor = scores.softmax(-1)
    return probabilities


def test_the_most_likely_token_stays_however_small_top_p_is() -> None:
    logits_BV = torch.randn(8, VOCAB_SIZE)
    probs_BV = filtered_probabilities(logits_BV, [Sampling(temperature=1.0, top_p=1e-9)] * 8)
    assert probs_BV.argmax(-1).tolist() == logits_BV.argmax(-1).tolist()
    assert (probs_BV > 0).sum(-1).tolist() == [1] * 8


# Drawing


# Seeds are fixed: of random ones, some would miss any bound.
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**63 - 1])
@pytest.mark.parametrize("over", ["positions", "choices", "seeds"])
def test_tokens_are_drawn_with_their_probabilities(seed: int, over: str) -> None:
    sampling = Sampling(temperature=0.7, top_k=10, seed=seed)
    if over == "positions":
        rows = [row(sampling, token_ids=range(position)) for position in range(NUM_DRAWS)]
    elif over == "choices":
        rows = [row(sampling, choice=choice) for choice in range(NUM_DRAWS)]
    else:
        rows = [row(dataclasses.replace(sampling, seed=seed ^ number)) for number in range(NUM_DRAWS)]
    logits_V = torch.linspace(-1, 1, 16)
    drawn = sample(logits_V.expand(NUM_DRAWS, -1), rows)
    counts_V = np.bincount(drawn, minlength=16)
    expected_V = filtered_probabilities(logits_V.unsqueeze(0), [sampling])[0].numpy() * NUM_DRAWS
    kept_V = expected_V > 0
    chi_square = ((counts_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum()
    # 9 degrees of freedom: one stream in 100,000 is above 39.
    assert chi_square < 39


@either_way
@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_probability_zero_is_never_drawn(
    choose: Choose, point: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (model.sampler, model.sampler_cpu):
        monkeypatch.setattr(module, "uniform", lambda *_: point)
    logits_V = torch.full((VOCAB_SIZE,), -torch.inf)
    possible = sorted(random.sample(range(1, VOCAB_SIZE - 1), 3))
    logits_V[possible] = torch.randn(3)
    (token_id,) = choose(logits_V.unsqueeze(0), [row(Sampling(temperature=1.0))])
    assert token_id in possible


def test_a_token_does_not_depend_on_its_row_or_on_the_other_rows() -> None:
    logits_BV = torch.randn(20, VOCAB_SIZE)
    rows = [
        row(
            random.choice(
                (Sampling(), random_sampling(), dataclasses.replace(random_sampling(), presence_penalty=1.0))
            ),
            token_ids=[random.randrange(VOCAB_SIZE) for _ in range(random.randint(2, 9))],
            num_prompt_tokens=2,
            choice=random.randrange(4),
        )
        for _ in range(20)
    ]
    alone = [sample(logits_BV[index : index + 1], [rows[index]])[0] for index in range(20)]
    order = random.sample(range(20), 20)
    together = sample(logits_BV[order], [rows[index] for index in order])
    assert together == [alone[index] for index in order]


@pytest.mark.parametrize(
    ("other_seed", "other_choice", "other_position"),
    [(8, 1, 5), (7, 2, 5), (7, 1, 6)],
    ids=["seed", "choice", "position"],
)
def test_the_number_drawn_depends_on(other_seed: int, other_choice: int, other_position: int) -> None:
    assert uniform(7, 1, 5) != uniform(other_seed, other_choice, other_position)


def test_the_number_drawn_is_the_same_in_every_version() -> None:
    """A sequence may be continued by a worker of another version."""
    assert [uniform(0, 0, 0), uniform(7, 1, 5), uniform(2**63 - 1, 3, 100_000)] == PINNED


def test_the_number_drawn_is_that_of_a_generator_made_for_it() -> None:
    """Whatever was drawn before, in whatever thread."""

    def drawn(arguments: tuple[int, int, int]) -> bool:
        seed, choice, position = arguments
        bits = np.random.Philox(key=seed, counter=[position, choice, 0, 0]).random_raw()
        return uniform(seed, choice, position) == (bits >> 11) * 2.0**-53

    edges = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    cases = [(seed, random.randrange(16), position) for seed in edges for position in (0, 1, 2**20)]
    cases += [(random.getrandbits(64), random.randrange(16), random.randrange(2**17)) for _ in range(500)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(drawn, cases))


@either_way
def test_drafts_are_drawn_as_if_they_stood(choose: Choose) -> None:
    """A draft is the token sampled at its position, with the noise, the penalties and the minimum of that."""
    logits_BV, stopping = torch.randn(60, VOCAB_SIZE), Stopping(max_new_tokens=9, min_new_tokens=3, stop_token_ids=(4,))
    logits_BV[:, 4] += 5.0
    drafted, standing = [], []
    for index in range(len(logits_BV)):
        sampling = random.choice(
            (Sampling(repetition_penalty=2.0), Sampling(frequency_penalty=1.5), Sampling(temperature=1.0, seed=index))
        )
        ids, num_drafted = random.choices(range(VOCAB_SIZE), k=random.randint(3, 12)), random.randint(1, 2)
        whole = row(sampling, ids, len(ids) - num_drafted - random.randint(0, 1), stopping=stopping)
        cut = len(ids) - num_drafted
        drafted.append(dataclasses.replace(whole, token_ids=ids[:cut], drafted=ids[cut:]))
        standing.append(whole)
    assert choose(logits_BV, drafted) == choose(logits_BV, standing)


@either_way
def test_logits_are_left_as_they_were(choose: Choose) -> None:
    logits_BV = torch.randn(3, VOCAB_SIZE)
    before = logits_BV.clone()
    choose(logits_BV, [row(dataclasses.replace(random_sampling(), repetition_penalty=2.0), [1, 2], 1)] * 3)
    assert logits_BV.equal(before)


# Greedy


@either_way
def test_temperature_zero_takes_the_largest_logit_beside_rows_that_are_drawn(choose: Choose) -> None:
    logits_BV = torch.randn(32, VOCAB_SIZE)
    rows = [row(Sampling() if index % 2 else random_sampling()) for index in range(32)]
    assert choose(logits_BV, rows)[1::2] == logits_BV.argmax(-1).tolist()[1::2]


def test_temperature_zero_alone_takes_the_largest_logit() -> None:
    logits_BV = torch.randn(32, VOCAB_SIZE)
    assert sample(logits_BV, [row(Sampling())] * 32) == logits_BV.argmax(-1).tolist()


# Penalties, seen through the token that is the largest after them


def histories(count: int) -> list[tuple[list[int], int]]:
    """Token ids with repetitions, and how many of them are the prompt."""
    lengths = [(random.randint(1, 15), random.randint(0, 15)) for _ in range(count)]
    return [([random.randrange(VOCAB_SIZE // 2) for _ in range(prompt + answer)], prompt) for prompt, answer in lengths]


@either_way
@pytest.mark.parametrize("penalty", [0.5, 1.3, 3.0])
def test_repetition_is_penalised_as_by_transformers(choose: Choose, penalty: float) -> None:
    cases, logits_BV = histories(200), torch.randn(200, VOCAB_SIZE)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        processor(torch.tensor([token_ids]), logits_V.unsqueeze(0).clone()).argmax().item()
        for (token_ids, _), logits_V in zip(cases, logits_BV, strict=True)
    ]
    found = choose(logits_BV, [row(Sampling(repetition_penalty=penalty), *case) for case in cases])
    assert found == expected


@either_way
@pytest.mark.parametrize(("presence", "frequency"), [(1.0, 0.0), (0.0, 0.5), (-0.7, 0.4), (0.6, -0.3)])
def test_presence_and_frequency_of_the_answer_are_penalised_as_by_openai(
    choose: Choose, presence: float, frequency: float
) -> None:
    """`logit[j] - count[j] · frequency - (count[j] > 0) · presence`, counted over the answer alone."""
    cases, logits_BV = histories(200), torch.randn(200, VOCAB_SIZE)
    counts_BV = torch.tensor(
        [np.bincount(token_ids[prompt:], minlength=VOCAB_SIZE).tolist() for token_ids, prompt in cases]
    )
    expected = (logits_BV - counts_BV * frequency - (counts_BV > 0) * presence).argmax(-1).tolist()
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency)
    assert choose(logits_BV, [row(sampling, *case) for case in cases]) == expected


# The minimum length


@either_way
@pytest.mark.parametrize("temperatures", [(0.0, 0.0), (0.0, 1.0)], ids=["greedy", "mixed"])
@pytest.mark.parametrize(("num_new_tokens", "may_stop"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_stop_tokens_are_not_chosen_before_the_minimum_is_reached(
    choose: Choose, temperatures: Sequence[float], num_new_tokens: int, may_stop: bool
) -> None:
    """The fourth token may be the stop: there are three without it."""
    logits_BV = torch.zeros(2, VOCAB_SIZE)
    logits_BV[:, [4, 9]] = 50.0
    stopping = Stopping(max_new_tokens=10, min_new_tokens=3, stop_token_ids=(4, 9))
    token_ids = [0] * (2 + num_new_tokens)
    rows = [row(Sampling(temperature=temperature), token_ids, 2, stopping=stopping) for temperature in temperatures]
    assert [token_id in (4, 9) for token_id in choose(logits_BV, rows)] == [may_stop] * 2


# Log-probabilities


def test_logprobs_are_those_of_log_softmax_before_any_processor() -> None:
    logits_BV = torch.randn(4, VOCAB_SIZE)
    token_ids = [random.randrange(VOCAB_SIZE) for _ in range(4)]
    found = [logprob.logprob for logprob in logprobs(logits_BV, token_ids, 0)]
    assert found == logits_BV.log_softmax(-1)[range(4), token_ids].tolist()


def test_the_top_logprobs_are_the_largest_in_order() -> None:
    logits_BV = torch.randn(4, VOCAB_SIZE)
    found = logprobs(logits_BV, [0, 1, 2, 3], 5)
    order = logits_BV.argsort(-1, descending=True)[:, :5]
    assert [[token_id for token_id, _ in logprob.top] for logprob in found] == order.tolist()


def test_no_alternatives_are_reported_when_none_are_asked_for() -> None:
    (found,) = logprobs(torch.randn(1, VOCAB_SIZE), [3], 0)
    assert found.top == ()


def test_all_are_reported_when_more_alternatives_are_asked_for_than_there_are() -> None:
    logits_BV = torch.randn(2, VOCAB_SIZE)
    for found, logits_V in zip(logprobs(logits_BV, [0, 1], VOCAB_SIZE + 1), logits_BV, strict=True):
        assert [token_id for token_id, _ in found.top] == logits_V.argsort(descending=True).tolist()
