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


DEAF = """
import asyncio

from cluster.api import frontend_actor
from octet.mailbox import AsyncMailbox
from tests.unit.cluster.played import FRONTEND, PLAN


class BrokenMailbox(AsyncMailbox):
    async def receive(self):
        await broken.wait()
        raise OSError("no such socket")


async def main():
    actor = frontend_actor.FrontendActor(FRONTEND, PLAN, None)
    await actor.listen(0)
    await actor.serve({}, {})
    await actor.ping()
    print("well", flush=True)
    broken.set()
    await asyncio.sleep(0.1)
    await actor.ping()
    print("well", flush=True)


broken = asyncio.Event()
frontend_actor.AsyncMailbox = BrokenMailbox
asyncio.run(main())
"""


def test_a_frontend_that_reads_no_reports_any_more_ends_when_it_is_asked_how_it_is() -> None:
    done = subprocess.run([sys.executable, "-c", DEAF], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "well\n"), done.stderr
    assert "no such socket" in done.stderr
