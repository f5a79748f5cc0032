"""Run by Ray in place of Python: has this node's fork server become the worker that was asked for.

    python -I -S fork_client.py default_worker.py ARGUMENTS…

or, where a raylet runs it in place of every Python (`cluster.workers.worker_start.forking`), in place of Ray's own
script that reads a worker's runtime environment and goes on to the line above, which imports Ray for it, 0.6 s of a
core:

    python -I -S fork_client.py setup_worker.py default_worker.py ARGUMENTS… --serialized-runtime-env-context=JSON

It imports little of the standard library and nothing else, so that it costs milliseconds. The first one that finds no
server starts one. Whatever goes wrong with that, it becomes an ordinary Python that runs the worker: nothing is lost
but time.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

ANSWER_S = 30.0
"""For the server's imports, on a machine on which many processes start. Ray gives up a worker after 60 s, in which it
has to start by itself if need be."""
LENGTH_BYTES = 4
_STORE = "--object-store-name="
_SETUP, _CONTEXT, _LANGUAGE = "setup_worker.py", "--serialized-runtime-env-context=", "--language="


def main() -> None:
    asked = sys.argv[1:]
    worker = set_up(asked) if pathlib.PurePath(asked[0]).name == _SETUP else asked
    if worker is not None:
        try:
            ask(address(worker), worker)
        except (OSError, EOFError) as error:
            print(f"octet: no fork server ({error}): this worker starts by itself", file=sys.stderr, flush=True)
        else:
            return
    os.execv(sys.executable, [sys.executable, *asked])


def command() -> str:
    """Runs this file, in a shell."""
    return shlex.join([sys.executable, "-I", "-S", __file__])


def set_up(asked: Sequence[str]) -> list[str] | None:
    """Do what Ray's script would for a runtime environment that is ours and nothing else.

    Returns: the worker's command line; None if it is another environment.
    """
    contexts = [argument.removeprefix(_CONTEXT) for argument in asked if argument.startswith(_CONTEXT)]
    try:
        (context,) = map(json.loads, contexts)
        executable, variables = context.pop("py_executable"), context.pop("env_vars")
        if command() not in executable or any(context.values()):
            return None
        os.environ.update(variables)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return [argument for argument in asked[1:] if not argument.startswith((_CONTEXT, _LANGUAGE))]


def address(worker: Sequence[str]) -> pathlib.Path:
    """Where a server for such a worker listens: beside Ray's own sockets.

    Ray reads its settings, of which a worker's job and raylet are two, from the environment when it is imported: a
    server can only become workers that have the same. And there is one for each installation of Octet.
    """
    stores = [argument.removeprefix(_STORE) for argument in worker if argument.startswith(_STORE)]
    if not stores:
        raise FileNotFoundError(f"no {_STORE}… among the worker's arguments")
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("RAY_"))
    kind = hashlib.sha256("\0".join([__file__, *settings]).encode()).hexdigest()[:12]
    return pathlib.Path(stores[0]).with_name(f"fork-{kind}")


def ask(path: pathlib.Path, worker: Sequence[str]) -> int:
    """Returns: the pid of the worker, whose standard files are those of this process. Raises: OSError, EOFError."""
    priority = os.getpriority(os.PRIO_PROCESS, 0)
    request = {"argv": worker, "env": dict(os.environ), "cwd": str(pathlib.Path.cwd()), "priority": priority}
    packed = json.dumps(request).encode()
    with connect(path) as connection:
        connection.settimeout(ANSWER_S)
        standard = array.array("i", [0, 1, 2])
        header = len(packed).to_bytes(LENGTH_BYTES, "big")
        connection.sendmsg([header], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, standard)])
        connection.sendall(packed)
        answer = connection.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        if len(answer) < LENGTH_BYTES:
            raise EOFError("it went away")
        return int.from_bytes(answer, "big")


def connect(path: pathlib.Path) -> socket.socket:
    """To the server, which is started if there is none. Raises: OSError."""
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
            return _connected(path)
        server = start(path)
        deadline_s = time.monotonic() + ANSWER_S
        while True:
            try:
                return _connected(path)
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline_s or server.poll() is not None:
                    raise
                time.sleep(0.02)


def start(path: pathlib.Path) -> subprocess.Popen[bytes]:
    """A server in a session of its own, which outlives whoever started it."""
    with path.with_name(f"{path.name}.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.workers.fork_server", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _connected(path: pathlib.Path) -> socket.socket:
    if path.stat().st_uid != os.getuid():
        raise PermissionError(f"{path} is somebody else's")
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection


if __name__ == "__main__":
    main()
