"""Reads what frontends wrote down: the files of `cluster.audit`."""

from __future__ import annotations

import json
import pathlib

from octet.errors import TraceError
from ops.chaos.history import Commit


def read_commits(directory: pathlib.Path, since_s: float = 0.0) -> list[Commit]:
    """Of every frontend in the order in which they started, from this time on; the members of that time come first.

    Raises: TraceError for a line that is none, unless it is the last one of a frontend that was killed.
    """
    commits: list[Commit] = []
    for file in sorted(directory.glob("*.jsonl")):
        lines = file.read_text().splitlines()
        for number, line in enumerate(lines, 1):
            try:
                commits.append(_commit(file.stem, json.loads(line)))
            except (ValueError, TypeError) as error:
                if number < len(lines):
                    raise TraceError(file.name, f"line {number}", str(error), "a line of a frontend's audit") from error
    return _since(commits, since_s)


def _commit(frontend: str, fields: dict[str, object]) -> Commit:
    for name in ("workers", "received"):
        value = fields.get(name, ())
        if not isinstance(value, list | tuple):
            raise TypeError(f"{name} is a {type(value).__name__}")
        fields[name] = tuple(value)
    return Commit(frontend=frontend, **fields)  # type: ignore[arg-type]


def _since(commits: list[Commit], since_s: float) -> list[Commit]:
    """Requests that were accepted before are left out as a whole."""
    known: dict[str, Commit] = {}
    accepted: set[tuple[str, str]] = set()
    kept: list[Commit] = []
    for commit in commits:
        if commit.kind == "workers" and commit.at_s < since_s:
            known[commit.frontend] = commit
        elif commit.kind == "workers":
            kept.append(commit)
        else:
            if commit.kind == "accept" and commit.at_s >= since_s:
                accepted.add((commit.frontend, commit.request_id))
            if (commit.frontend, commit.request_id) in accepted:
                kept.append(commit)
    return [*known.values(), *kept]
