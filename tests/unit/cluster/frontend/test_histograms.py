"""Distributions of what requests took: every value is in one bucket, and every request is told of once."""

from __future__ import annotations

import asyncio
import random

import pytest

from cluster.frontend.histograms import Histogram, RequestHistograms
from tests.unit.cluster.played import playing, token


def test_a_value_is_in_the_first_bucket_whose_bound_it_does_not_exceed() -> None:
    bounds = sorted(random.sample(range(1000), k=20))
    values = [random.choice((*bounds, random.uniform(-1.0, 1001.0))) for _ in range(300)]
    histogram = Histogram(bounds)
    for value in values:
        histogram.note(value)
    least = -float("inf")
    for bound, count in zip((*bounds, float("inf")), histogram.counts, strict=True):
        assert count == sum(least < value <= bound for value in values)
        least = bound
    assert histogram.sum == pytest.approx(sum(values))


def test_bounds_ascend() -> None:
    told = RequestHistograms()
    for histogram in (told.ttft_s, told.itl_s, told.e2e_s, told.prompt_tokens, told.new_tokens):
        assert list(histogram.bounds) == sorted(set(histogram.bounds))


async def test_a_finished_request_is_told_of_token_by_token_and_as_a_whole() -> None:
    async with playing() as cluster:
        client, request = await cluster.admitted(n=2)
        cluster.decode.tell(token(request, 0, 100), token(request, 0, 100, choice=1))
        await client.heard(1)
        await asyncio.sleep(0.05)
        cluster.decode.tell(
            token(request, 1, 101), token(request, 2, 102, "length"), token(request, 1, 1, "stop", choice=1)
        )
        await client.end()
        told = cluster.frontend.histograms
    assert [sum(each.counts) for each in (told.ttft_s, told.itl_s, told.e2e_s)] == [1, 3, 1]
    assert 0 < told.ttft_s.sum < told.e2e_s.sum - 0.05
    # Two choices waited for their second token.
    assert told.itl_s.sum >= 0.1
    assert (told.prompt_tokens.sum, told.new_tokens.sum) == (request.num_prompt_tokens, 5)


async def test_of_a_request_that_is_aborted_only_its_tokens_are_told() -> None:
    async with playing() as cluster:
        client, request = await cluster.admitted()
        cluster.prefill.tell(token(request, 0, 100))
        await client.heard(1)
        cluster.frontend.abort(request.request_id)
        await client.end()
        told = cluster.frontend.histograms
    assert [sum(each.counts) for each in (told.ttft_s, told.itl_s, told.e2e_s, told.new_tokens)] == [1, 0, 0, 0]
