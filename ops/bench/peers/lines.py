"""A peer in a process of its own, driven by JSON lines; see `ops.bench.peers.engines` for what they say."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ops.bench.peers.environments import PeerError

_END_S = 20.0
_LOG_LINES = 8


class LinePeer:
    """A process that answers one line with one line."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, start_s: float, answer_s: float
    ) -> None:
        """Start it, and wait until it says that it is ready.

        Args:
            environment: variables beside those of this process.

        Raises: PeerError with the end of what it wrote to standard error.
        """
        self.name, self._answer_s = name, answer_s
        self._log = pathlib.Path(tempfile.mkstemp(prefix=f"octet-peer-{name}-", suffix=".log")[1])
        with self._log.open("w") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=os.environ | environment,
                    # Of its own, so that what it starts can be ended with it, and a Ctrl-C is ours alone.
                    start_new_session=True,
                )
            except OSError as error:
                self._log.unlink()
                raise PeerError(name, f"does not start: {error}") from error
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"peer-{name}", daemon=True)
        self._reader.start()
        self._ids = itertools.count(1)
        try:
            self.version = str(self._next(start_s)["ready"])
        except BaseException:
            self.close()
            raise

    def ask(self, **fields: object) -> dict[str, Any]:
        """The answer to a request of these fields. Raises: PeerError."""
        number = next(self._ids)
        assert self._process.stdin is not None
        try:
            print(json.dumps({"id": number, **fields}), file=self._process.stdin, flush=True)
        except OSError:
            raise self._gone() from None
        answer = self._next(self._answer_s)
        if "error" in answer:
            raise PeerError(self.name, str(answer["error"]))
        if answer.get("id") != number:
            raise PeerError(self.name, f"answered request {answer.get('id')}, expected {number}")
        return answer

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """See `Contestant`."""
        answer = self.ask(prompts=[list(prompt) for prompt in prompts], new_tokens=new_tokens)
        if answer["tokens"] != [new_tokens] * len(prompts):
            raise PeerError(self.name, f"gave {answer['tokens']} tokens, expected {new_tokens} for each prompt")
        return float(answer["seconds"])

    def close(self) -> None:
        """End it: by the end of its input, or by force."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # What it started and left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._reader.join(_END_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._log.unlink(missing_ok=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerError(self.name, f"is silent for {timeout_s:.0f} s") from None
        if not line:
            raise self._gone()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise PeerError(self.name, f"wrote {line.strip()[:200]!r}, expected a JSON object")
        return answer

    def _gone(self) -> PeerError:
        said = self._log.read_text(errors="replace").strip().splitlines()[-_LOG_LINES:]
        return PeerError(self.name, "its process ended; it said: " + (" | ".join(said) or "nothing"))
