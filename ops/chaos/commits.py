"""Reads what frontends wrote down: the files of `cluster.frontend.audit`."""

from __future__ import annotations

import json
import pathlib

from octet.errors import TraceError
from ops.chaos.history import Commit


class AuditTrail:
    """Of one cluster. What was read once is not read again."""

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._read_bytes: dict[pathlib.Path, int] = {}
        self._members: dict[str, Commit] = {}
        """By frontend, what it wrote last of its members."""

    def read(self) -> list[Commit]:
        """What is new, of every frontend in the order in which they started, after the members that were known.

        Raises: TraceError for a line that is none; half a line at the end is what a killed frontend leaves.
        """
        known = list(self._members.values())
        # By the kernel's word: a frontend's own clock, after which its file is named, may have jumped.
        files = sorted(self._directory.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns)
        commits = [commit for file in files for commit in self._news(file)]
        for commit in commits:
            if commit.kind == "workers":
                self._members[commit.frontend] = commit
        return [*known, *commits]

    def _news(self, file: pathlib.Path) -> list[Commit]:
        with file.open("rb") as lines:
            lines.seek(self._read_bytes.get(file, 0))
            data = lines.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._read_bytes[file] = self._read_bytes.get(file, 0) + len(whole)
        found = []
        for line in whole.splitlines():
            try:
                found.append(_commit(file.stem, json.loads(line)))
            except (ValueError, TypeError) as error:
                raise TraceError(file.name, repr(line[:40]), str(error), "a line of a frontend's audit") from error
        return found


def _commit(frontend: str, fields: dict[str, object]) -> Commit:
    for name in ("workers", "received"):
        value = fields.get(name, ())
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is a {type(value).__name__}")
        fields[name] = tuple(value)
    return Commit(frontend=frontend, **fields)  # type: ignore[arg-type]
