"""What the frontend's process does once it is ready."""

from __future__ import annotations

import subprocess
import sys

SETTLE = """
import gc, weakref
from cluster.api.frontend_actor import _settle_garbage

_settle_garbage()
assert gc.get_freeze_count() > 9 * len(gc.get_objects())

class Node:
    pass

node = Node()
node.itself = node
left = weakref.ref(node)
del node
gc.collect()
assert left() is None
"""


def test_modules_are_no_more_looked_through_for_garbage_but_what_comes_later_is() -> None:
    done = subprocess.run([sys.executable, "-c", SETTLE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
