"""What tests of the decode engine share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.decode.pair import Pair
from tests.unit.embedded import Model


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load()


@pytest.fixture
def pairs(model: Model) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**arguments: int) -> Pair:
        made.append(Pair(model, **arguments))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(pairs: Callable[..., Pair]) -> Pair:
    return pairs()
