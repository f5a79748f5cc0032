from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.embedded import Model
from tests.unit.prefill.alone import Prefill


@pytest.fixture(scope="package")
def model() -> Model:
    return Model.load()


@pytest.fixture
def prefill(model: Model) -> Iterator[Prefill]:
    prefill = Prefill(model)
    yield prefill
    prefill.sender.close()
