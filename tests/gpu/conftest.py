"""Tests of what runs on GPUs, without Ray. Those that need CUDA skip, with the reason, where there is none; kernels are
interpreted there."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "tests/gpu" in str(item.path) and item.path.name != "test_kernels.py":
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
