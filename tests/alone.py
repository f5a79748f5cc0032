"""`octet serve` on a Ray of its own, in an environment of its own, of which nothing may be left."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping

import ray.util

from octet.addresses import family, with_port
from octet.client import Client
from ops.chaos.observe import state_of
from tests.clusters import OBJECT_STORE_BYTES, at_baseline, wait_until

START_S, STOP_S = 180.0, 60.0
BIN = pathlib.Path(sys.executable).parent
_MARK = "OCTET_TEST_ALONE"


@contextlib.contextmanager
def nothing_left() -> Iterator[dict[str, str]]:
    """Yields: an environment. Whoever was started in it, or by them, has ended soon after."""
    mark = uuid.uuid4().hex
    try:
        yield {_MARK: mark}
        wait_until(lambda: not _marked(mark), STOP_S, "every process has ended")
    finally:
        # What is found here failed the test, and is to take nothing from the next one.
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark: str) -> list[int]:
    """By their environment, since forks and daemons have other parents than who started them."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes() and state_of(int(entry.name)):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def own_ray(env: Mapping[str, str], host: str | None = None) -> Iterator[str]:
    """`ray start --head`, as in docs/cluster.md. Yields: its address.

    Args:
        host: of this machine's, the one that Ray is to have.
    """
    host = host or ray.util.get_node_ip_address()
    with socket.socket(family(host)) as found:
        found.bind((host, 0))
        port = found.getsockname()[1]
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    command = [str(BIN / "ray"), "start", "--head", "--block", f"--port={port}", f"--node-ip-address={host}"]
    command += ["--include-dashboard=false", "--num-cpus=8", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--temp-dir={directory}", "--disable-usage-stats"]
    with nothing_left() as marked:
        process = subprocess.Popen(
            command, env={**os.environ, **marked, **env}, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            yield with_port(host, port)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
            if process.poll() is None:
                process.kill()
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def serving(log: pathlib.Path, *args: str, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """Yields: the address of its API. At the end no page is held, it stops in order, and no process is left.

    Args:
        log: a file for what it says besides.
    """
    with nothing_left() as marked, log.open("w") as err:
        process = subprocess.Popen(
            [str(BIN / "octet"), "serve", "--grpc-port", "0", *args],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            start_new_session=True,
            env={**os.environ, **marked, **(env or {})},
        )
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], START_S)[0], f"nothing said within {START_S} s"
            line = process.stdout.readline()
            ready = re.match(r"octet: ready grpc=(\S+) ", line)
            assert ready, f"{line}{log.read_text()[-3000:]}"
            yield ready[1]
            with Client(ready[1], timeout_s=60) as client:
                wait_until(lambda: at_baseline(client.status()), 60, "every page is given back")
            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_S) == 0, log.read_text()[-3000:]
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=30)
