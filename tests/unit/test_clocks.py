"""What is decided by a clock is decided by one that does not jump: the time of day only says when something was."""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[2]
ROOMS = ("octet", "model", "experts", "router", "prefill", "decode", "cluster")
TIMES_OF_DAY = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
ALLOWED = {
    "cluster/frontend/audit.py": "when something was written, and a file's name",
    "cluster/workers/attention_worker.py": "a name for the process",
    "cluster/control/change_log.py": "when a change was",
    "cluster/control/membership.py": "a name that nobody has met under",
    "cluster/workers/shard_worker.py": "a name for the process",
    "model/chat_template.py": "the date that a template asks for",
    "octet/faults.py": "when a fault struck",
}


def _calls(tree: ast.AST) -> set[str]:
    """Of attributes, as the last two names before the parenthesis."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "time":
            found |= {f"time.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            found.add(f"{name}.{node.attr}")
    return found


def test_the_time_of_day_is_asked_for_only_where_nothing_is_decided_by_it() -> None:
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py") if "_pb2" not in file.name]
    assert len(files) > 100
    asking = {str(f.relative_to(ROOT)) for f in files if _calls(ast.parse(f.read_text())) & TIMES_OF_DAY}
    assert asking == set(ALLOWED)


def test_the_scan_finds_every_way_to_ask() -> None:
    for source in ("import time\ntime.time()", "from time import time_ns", "import datetime\ndatetime.datetime.now()"):
        assert _calls(ast.parse(source)) & TIMES_OF_DAY
