"""What a frontend commits, in its order, for whoever checks it afterwards: a file of JSON lines. Off unless configured.

Each line is there before the next thing happens, so that a frontend that is killed leaves all that it did. Where that
cannot be, as on a full disk, the file ends with its last whole line, and requests go on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterable, Sequence

from octet.ids import RequestId, WorkerId
from octet.messages import TokenEvent

_log = logging.getLogger(__name__)


class Audit:
    """Writes nothing where it is given no directory."""

    def __init__(self, directory: str | None, worker_id: WorkerId) -> None:
        """
        Args:
            directory: made if it is not there; every process of a frontend writes a file of its own in it.
        """
        self._file: int | None = None
        if directory is not None:
            pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns()}-{worker_id}-{os.getpid()}.jsonl"
            self._file = os.open(pathlib.Path(directory) / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def workers(self, worker_ids: Iterable[WorkerId]) -> None:
        """Reports of these count from now on."""
        self._write("workers", workers=sorted(worker_ids))

    def accept(self, request_id: RequestId, received: Sequence[int]) -> None:
        """
        Args:
            received: how many tokens of each choice its client has already.
        """
        self._write("accept", request_id=request_id, received=list(received))

    def commit(self, event: TokenEvent, worker_id: WorkerId) -> None:
        self._write(
            "commit",
            request_id=event.request_id,
            choice=event.choice,
            attempt=event.attempt,
            index=event.index,
            worker=worker_id,
        )

    def end(self, request_id: RequestId, outcome: str) -> None:
        self._write("end", request_id=request_id, outcome=outcome)

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):
                os.close(file)

    def _write(self, kind: str, **fields: object) -> None:
        if self._file is None:
            return
        line = json.dumps({"kind": kind, "at_s": time.time(), **fields}, separators=(",", ":")).encode() + b"\n"
        try:
            written = os.write(self._file, line)
            reason = "" if written == len(line) else "the file system is full"
        except OSError as error:
            reason = error.strerror or repr(error)
        if reason:
            _log.error("what is committed is not written down any more (chaos.audit_dir): %s", reason)
            self.close()
