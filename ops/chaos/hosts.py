"""A Ray of two nodes on two hosts: its head and the driver on the near one, members on both."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from cluster.nodes import connected, wait_for_nodes
from octet.errors import ConfigError
from ops.chaos.cable import ADDRESSES, Cable, Host, cable

_PORT = 6379
_NUM_CPUS = 16
_OBJECT_STORE_BYTES = 128 * 2**20
_START_S = 90.0
_HEALTH = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 5}
"""By which Ray takes a node for dead within eight seconds."""


class Hosts:
    """Made by `two_hosts`."""

    def __init__(self, laid: Cable) -> None:
        self.cable = laid
        self.ray_address = f"{ADDRESSES['near']}:{_PORT}"
        self._nodes: list[subprocess.Popen[bytes]] = []

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of a cluster's configuration, so that each pool is on both."""
        spread = (f"pools.{pool}.strategy=SPREAD" for pool in ("prefill", "decode", "experts"))
        return (f"ray.address={self.ray_address}", *spread)

    def start_node(self, host: Host, *options: str) -> None:
        """A child of this process, as long as there is the host."""
        sizes = (f"--num-cpus={_NUM_CPUS}", f"--object-store-memory={_OBJECT_STORE_BYTES}")
        start = ("-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={ADDRESSES[host]}")
        node = subprocess.Popen(
            [*self.cable.command(host), sys.executable, *start, *sizes, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
        )
        self._nodes.append(node)


@contextlib.contextmanager
def two_hosts(directory: pathlib.Path | None = None) -> Iterator[Hosts]:
    """Within the context this thread, and all that it starts, is on the near host, and connected to Ray.

    Ray's token is to be in the environment before Ray is imported.

    Args:
        directory: of Ray's session and logs; one of its own by default.

    Raises: ConfigError where there can be no second host, StartupError.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise ConfigError("RAY_AUTH_MODE", os.environ.get("RAY_AUTH_MODE"), "token, before Ray is imported")
    with (
        cable() as laid,
        tempfile.TemporaryDirectory(prefix="octet-ray-", ignore_cleanup_errors=True) as own,
        laid.here("near"),
    ):
        hosts = Hosts(laid)
        try:
            health = f"--system-config={json.dumps(_HEALTH)}"
            head = ("--head", f"--port={_PORT}", "--include-dashboard=false", f"--temp-dir={directory or own}", health)
            hosts.start_node("near", *head)
            with connected(hosts.ray_address, 1, _START_S):
                # A node that finds no head within seconds gives up, and a busy machine takes longer to start one.
                hosts.start_node("far", f"--address={hosts.ray_address}")
                wait_for_nodes(len(ADDRESSES), _START_S)
                yield hosts
        finally:
            # Before the directory, into which they write.
            laid.remove()
