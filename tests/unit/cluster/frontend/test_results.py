from __future__ import annotations

from typing import Any

import pytest

from cluster.frontend.answer import Piece
from cluster.frontend.record import Outcome, Record
from cluster.frontend.results import KeptResults
from octet.config import FrontendConfig
from octet.ids import RequestId
from octet.messages import TokenLogprob

KEEP_S = 10.0


def record(name: str, num_tokens: int = 1) -> Record:
    record = Record(RequestId(name), b"", [0], 3)
    for index in range(num_tokens):
        record.say(Piece(choice=0, offset=index, token_ids=(7,), text="a", logprobs=()))
    record.end(Outcome(kind="finished"))
    return record


def kept(**settings: Any) -> KeptResults:
    return KeptResults(FrontendConfig(**({"keep_results_s": KEEP_S} | settings)))


def names(results: KeptResults, *asked: str, now_s: float = 0.0) -> list[str]:
    return [name for name in asked if results.get(RequestId(name), now_s) is not None]


@pytest.mark.parametrize(("now_s", "found"), [(9.9, True), (10.0, False)])
def test_a_result_is_kept_for_its_time(now_s: float, found: bool) -> None:
    results = kept()
    results.keep(record("a"), 0.0)
    assert (results.get(RequestId("a"), now_s) is not None) is found


def test_the_oldest_goes_when_there_are_too_many() -> None:
    results = kept(max_kept_results=2)
    for name in "abc":
        results.keep(record(name), 0.0)
    assert names(results, "a", "b", "c") == ["b", "c"]


def test_the_oldest_go_when_they_are_too_large() -> None:
    results = kept(max_kept_mib=1)
    each = 2**20 // record("a", 100).num_bytes * 100 // 3
    for name in "abcd":
        results.keep(record(name, each), 0.0)
    assert names(results, "a", "b", "c", "d") == ["b", "c", "d"]


def test_log_probabilities_of_a_prompt_count_like_those_of_an_answer() -> None:
    """8,000 of them, with 20 alternatives each, take some 20 MiB."""
    entries = [TokenLogprob(token_id=7, logprob=-1.0, top=((8, -2.0),) * 20)] * 8000
    prompt, answer = record("prompt"), record("answer")
    prompt.prompt_logprobs = tuple(entries)
    answer.transcripts[0].add(Piece(choice=0, offset=1, token_ids=(), text="", logprobs=tuple(entries)))
    assert abs(prompt.num_bytes - answer.num_bytes) < 200
    results = kept(max_kept_mib=10)
    results.keep(prompt, 0.0)
    assert len(results) == 0


def test_one_that_is_too_large_itself_is_not_kept() -> None:
    results = kept(max_kept_mib=0)
    results.keep(record("a"), 0.0)
    assert len(results) == 0


def test_a_newer_result_replaces_the_one_of_its_id_and_counts_once() -> None:
    results = kept(max_kept_results=2)
    newer = record("a", 5)
    for each in (record("a"), record("b"), newer):
        results.keep(each, 0.0)
    assert (results.get(RequestId("a"), 0.0), len(results)) == (newer, 2)


def test_what_is_forgotten_makes_room() -> None:
    results = kept(max_kept_results=1)
    results.keep(record("a"), 0.0)
    for _ in range(2):
        results.forget(RequestId("a"))
    results.keep(record("b"), 0.0)
    assert names(results, "a", "b") == ["b"]
