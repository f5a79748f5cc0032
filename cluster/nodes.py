"""A connection of this process to a Ray whose nodes are still joining."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator

import ray

from octet.errors import StartupError

_POLL_S = 0.3


@contextlib.contextmanager
def connected(address: str, num_nodes: int, timeout_s: float) -> Iterator[None]:
    """Within the context, this process is connected, and so many nodes have joined. Raises: StartupError."""
    deadline_s = time.monotonic() + timeout_s
    _connect(address, deadline_s)
    try:
        wait_for_nodes(num_nodes, deadline_s - time.monotonic())
        yield
    finally:
        ray.shutdown()


def wait_for_nodes(num_nodes: int, timeout_s: float) -> None:
    """Until so many are alive. Raises: StartupError."""
    deadline_s = time.monotonic() + timeout_s
    while sum(node["Alive"] for node in ray.nodes()) < num_nodes:
        if time.monotonic() > deadline_s:
            raise StartupError(f"Ray had fewer than {num_nodes} nodes after {timeout_s:g} s")
        time.sleep(_POLL_S)


def _connect(address: str, deadline_s: float) -> None:
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if time.monotonic() > deadline_s:
                raise StartupError(f"no Ray at {address}: {error}") from error
            time.sleep(_POLL_S)
        else:
            return
