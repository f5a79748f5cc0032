from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.prefill.alone import Model, Prefill, make_model


@pytest.fixture(scope="package")
def model() -> Model:
    return make_model()


@pytest.fixture
def prefill(model: Model) -> Iterator[Prefill]:
    prefill = Prefill(model)
    yield prefill
    prefill.sender.close()
