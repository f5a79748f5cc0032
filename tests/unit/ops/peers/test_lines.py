"""A peer in a process of its own: real processes of a few lines, on the real protocol."""

from __future__ import annotations

import io
import json
import pathlib
import sys
import tempfile
import time

import pytest

from ops.bench.peers import engines
from ops.bench.peers.environments import PeerError
from ops.bench.peers.lines import LinePeer

GOOD = """
import sys, time
sys.path.insert(0, {folder!r})
from engines import claim_stdout, serve, timed
replies = claim_stdout()
print("a library that talks")
def generate(prompts, new_tokens):
    time.sleep(0.05)
    if new_tokens == 13:
        raise ValueError("unlucky")
    return [new_tokens - (new_tokens == 7)] * len(prompts)
serve("echo 1.0", timed(generate), sys.stdin, replies)
"""


def start(script: str, *, start_s: float = 20.0, answer_s: float = 20.0) -> LinePeer:
    folder = str(pathlib.Path(engines.__file__).parent)
    code = script.replace("{folder!r}", repr(folder))
    return LinePeer("echo", [sys.executable, "-c", code], {}, start_s=start_s, answer_s=answer_s)


def test_a_peer_says_what_it_is_and_how_long_it_took() -> None:
    peer = start(GOOD)
    assert peer.version == "echo 1.0"
    for _ in range(2):
        start_s = time.perf_counter()
        seconds = peer.run([[1, 2], [3]], 5)
        assert 0.05 <= seconds <= time.perf_counter() - start_s
    peer.close()


def test_an_error_of_one_request_is_told_and_the_next_one_runs() -> None:
    peer = start(GOOD)
    with pytest.raises(PeerError, match="unlucky"):
        peer.run([[1]], 13)
    assert peer.run([[1]], 2) > 0
    peer.close()


def test_too_few_tokens_are_no_result() -> None:
    peer = start(GOOD)
    with pytest.raises(PeerError, match=r"\[6, 6\] tokens, expected 7"):
        peer.run([[1], [2]], 7)
    peer.close()


def test_a_peer_that_does_not_start_says_why() -> None:
    with pytest.raises(PeerError, match="no such engine"):
        start("raise SystemExit('no such engine')")


def test_a_peer_that_ends_midway_says_why() -> None:
    peer = start("""
import sys
print('{"ready": "x"}', flush=True)
sys.stdin.readline()
sys.exit("out of memory")
""")
    with pytest.raises(PeerError, match="out of memory"):
        peer.run([[1]], 1)
    peer.close()


def test_a_silent_peer_is_given_up_at_its_deadline() -> None:
    peer = start("""
import sys
print('{"ready": "x"}', flush=True)
for _ in sys.stdin: pass
""", answer_s=0.2)  # fmt: skip
    with pytest.raises(PeerError, match="silent"):
        peer.run([[1]], 1)
    peer.close()


def test_what_is_no_json_is_shown() -> None:
    with pytest.raises(PeerError, match="'hello'"):
        start("print('hello', flush=True); input()")


def test_a_missing_program_is_a_peer_error_and_leaves_no_log(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PeerError, match="does not start"):
        LinePeer("none", ["/nowhere/python"], {}, start_s=1.0, answer_s=1.0)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_answers_every_line() -> None:
    requests = io.StringIO(
        "".join(json.dumps({"id": n, "prompts": [[1], [2, 3]], "new_tokens": n}) + "\n" for n in (4, 5))
    )
    replies = io.StringIO()
    answer = engines.timed(lambda prompts, new_tokens: [new_tokens] * len(prompts))
    engines.serve("ready", answer, requests, replies)
    first, *answers = map(json.loads, replies.getvalue().splitlines())
    assert first == {"ready": "ready"}
    assert [(answer["id"], answer["tokens"]) for answer in answers] == [(4, [4, 4]), (5, [5, 5])]
