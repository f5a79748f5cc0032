"""The frontend's time of day jumps under its streams: no deadline, grace or kept answer is measured by it."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import grpc
import pytest

from octet.client import CallError, Client
from ops.chaos.wall_clock import WallClock, why_no_wall_clock

REASON = why_no_wall_clock()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)
TIMEOUT_S, NUM_TOKENS = 30.0, 60


@pytest.fixture
def clock(tmp_path: pathlib.Path) -> WallClock:
    return WallClock(tmp_path)


@pytest.fixture
def address(clock: WallClock) -> Iterator[str]:
    command = [sys.executable, "-m", "tests.unit.cluster.serve_played"]
    env = {**os.environ, **clock.env}
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield f"127.0.0.1:{int(process.stdout.readline())}"
        process.communicate(timeout=30)


@pytest.mark.parametrize("jump_s", [7200.0, -7200.0], ids=["forward", "back"])
def test_a_jump_ends_no_request_and_lengthens_no_deadline(address: str, clock: WallClock, jump_s: float) -> None:
    with Client(address, timeout_s=TIMEOUT_S) as client:
        alone = client.generate([1, 2, 3], max_new_tokens=NUM_TOKENS, ignore_eos=True, seed=1, request_id="a")
        expected = list(alone.choices[0].token_ids)
        assert len(expected) == NUM_TOKENS
        found: list[int] = []
        for chunk in client.stream([1, 2, 3], max_new_tokens=NUM_TOKENS, ignore_eos=True, request_id="b"):
            if not found:
                clock.jump(jump_s)
            found += chunk.token_ids
        assert len(found) == NUM_TOKENS
        # What was kept before is kept still: the same answer, and not a second one.
        again = client.generate([1, 2, 3], max_new_tokens=NUM_TOKENS, ignore_eos=True, seed=1, request_id="a")
        assert list(again.choices[0].token_ids) == expected
        assert len(client.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True).choices[0].token_ids) == 5
        # The server's own word, which comes a little before its client would give up.
        with pytest.raises(CallError, match="it was not complete within") as caught:
            client.generate([1, 2, 3], max_new_tokens=150, ignore_eos=True, timeout_s=2.0)
        assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
