"""A process that has imported what members need, and becomes them: it forks one for each that Ray starts.

To import torch, and to load what numba has compiled, takes four seconds of a core. A fork of a process that has done so
takes milliseconds, and shares the memory. Where processes start beside those that serve, that is what a start costs
the running streams.

The first worker starts it (`cluster.workers.fork_client`). There is one for each job on each raylet, which ends by
itself when it has had no child for a while. It answers processes of its own user only. No thread is ever started in
it, since a fork has only the one that forked.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import pathlib
import random
import runpy
import select
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from cluster.workers.fork_client import LENGTH_BYTES
from octet.errors import WireError

IDLE_S = 5.0
_REQUEST_S = 5.0
_LARGEST_REQUEST = 2**22
_NUM_FILES = 3
PRELOADED = (
    "ray._private.workers.default_worker",
    "cluster.workers.attention_worker",
    "cluster.workers.shard_worker",
    "cluster.workers.router_actor",
    "cluster.api.frontend_actor",
    "cluster.control.controller",
    "experts.grouped_cpu",
    "model.compiled_layers",
    "router.frames_cpu",
    "router.gate_cpu",
    "router.plan_cpu",
)


class ForkServer:
    """Listens at a path, and forks, until nobody needs it. Belongs to the only thread of its process."""

    def __init__(self, path: pathlib.Path, idle_s: float = IDLE_S) -> None:
        """
        Args:
            idle_s: without a child, after which it ends.
        """
        self._path, self._idle_s = path, idle_s
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        self._children: set[int] = set()
        signal.signal(signal.SIGCHLD, self._reap)

    def serve(self) -> dict[str, Any] | None:
        """Fork for everyone who asks.

        Returns: in a child, the arguments of `become`; in the server None, at its end.
        """
        while True:
            readable, _, _ = select.select([self._listener], [], [], self._idle_s)
            if not readable:
                if self._children:
                    continue
                self._path.unlink(missing_ok=True)
                self._listener.close()
                return None
            connection, _ = self._listener.accept()
            with connection:
                try:
                    request = receive(connection)
                except (OSError, ValueError, WireError) as error:
                    print(f"not served: {error}", file=sys.stderr, flush=True)
                    continue
                pid = self._fork()
                if pid == 0:
                    return request
                for fd in request["fds"]:
                    os.close(fd)
                with contextlib.suppress(OSError):
                    connection.sendall(pid.to_bytes(LENGTH_BYTES, "big"))

    def _fork(self) -> int:
        # A child that ends at once is known before its end is.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._listener.close()
        else:
            self._children.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        return pid

    def _reap(self, *signalled: object) -> None:
        """At once: whoever waits for the end of a member looks for its pid."""
        # Another child may end meanwhile, and be reaped by a call of this within this one.
        with contextlib.suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                self._children.discard(pid)


def receive(connection: socket.socket) -> dict[str, Any]:
    """What a client asks for. Raises: WireError if it is of another user, or asks for nothing sensible; OSError."""
    connection.settimeout(_REQUEST_S)
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    if uid != os.getuid():
        raise WireError(f"a client of user {uid}, expected {os.getuid()}")
    fds = array.array("i")
    header, ancillary, _, _ = connection.recvmsg(LENGTH_BYTES, socket.CMSG_SPACE(_NUM_FILES * fds.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data)
    try:
        size = int.from_bytes(header, "big")
        if len(header) < LENGTH_BYTES or not 0 < size <= _LARGEST_REQUEST or len(fds) != _NUM_FILES:
            raise WireError(f"a request of {size} bytes with {len(fds)} files")
        request = json.loads(connection.recv(size, socket.MSG_WAITALL))
        if not isinstance(request, dict) or request.keys() != {"argv", "env", "cwd", "priority"}:
            raise WireError("a request of other fields")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return request | {"fds": list(fds)}


def become(argv: Sequence[str], env: Mapping[str, str], cwd: str, priority: int, fds: Sequence[int]) -> NoReturn:
    """Run a script as if Python had been started with it."""
    # As Ray has it: a group of its own, to be signalled by, but no session: Linux gives sessions equal shares of the
    # machine, and to processes of one it gives them by their niceness.
    os.setpgid(0, 0)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, priority)
    searched = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path and path not in sys.path]
    sys.path[:0] = searched
    random.seed()
    sys.argv = list(argv)
    runpy.run_path(argv[0], run_name="__main__")
    sys.exit(0)


def run(path: pathlib.Path, preloaded: Sequence[str] = PRELOADED, idle_s: float = IDLE_S) -> None:
    """Returns when nobody needs a server any more; in a child, never."""
    # Those who come while modules are imported wait.
    server = ForkServer(path, idle_s)
    # NumPy's library for matrices, of which we have no use, starts one for each core.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    for module in preloaded:
        # What there is not on this machine (numba, where there are GPUs) is left to those who need it.
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    threads = list(pathlib.Path("/proc/self/task").iterdir())
    if len(threads) > 1:
        raise RuntimeError(f"an import has started {len(threads) - 1} threads, which a fork would not have")
    gc.collect()
    # Collections would write to what is here now, and copy its pages in every child.
    gc.freeze()
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = server.serve()
    if request is not None:
        signal.signal(signal.SIGINT, interrupt)
        become(**request)


if __name__ == "__main__":
    run(pathlib.Path(sys.argv[1]))
