"""Settings of every test."""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import random
import signal

import hypothesis
import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts us in the background has it ignored, and so would the commands be that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not torch.cuda.is_available():
    # For kernels of GPUs. It has to be said before anybody imports Triton, and transformers does.
    os.environ["TRITON_INTERPRET"] = "1"

# Speed is measured by benchmarks; a loaded machine must fail no test.
hypothesis.settings.register_profile("octet", deadline=None)
hypothesis.settings.register_profile("long", deadline=None, max_examples=6000)
hypothesis.settings.load_profile("octet")

# One Ray for every test that needs one, whatever folder it is in. Those of a GPU run where there is none, too.
_HAS_RAY = importlib.util.find_spec("ray") is not None
pytest_plugins = ("tests.clusters",) if _HAS_RAY else ()

SHARED_CLUSTERS = ("chaos", "embedded", "small", "paired")


@pytest.fixture
def fresh_seed() -> None:
    """Inputs are drawn afresh; a failing test shows how to draw them again."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one cluster follow each other, in one process where several share the work (`--dist loadgroup`)."""
    used: dict[pathlib.Path, set[str]] = collections.defaultdict(set)
    for item in items:
        used[item.path].update(getattr(item, "fixturenames", ()))
        # A fixture may also be asked for by a parameter.
        if (call := getattr(item, "callspec", None)) is not None:
            used[item.path].update(value for value in call.params.values() if isinstance(value, str))
    order: dict[str, int] = {}
    for item in items:
        shared = [name for name in SHARED_CLUSTERS if name in used[item.path]]
        group = shared[0] if shared else item.path.stem
        order.setdefault(group, len(order))
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: order[_group(item)])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Clusters that no later test asks for take no time from it, once the test's own fixtures are done with them."""
    if _HAS_RAY and nextitem is not None and _group(nextitem) != _group(item):
        # Not earlier: as a plugin it is to be loaded by pytest.
        from tests.clusters import stop_shared_clusters

        stop_shared_clusters()


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return str(marker.args[0])
