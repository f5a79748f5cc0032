from __future__ import annotations

import dataclasses

import pytest

from cluster.frontend.answer import Piece
from cluster.frontend.transcript import Transcript
from octet.messages import TokenLogprob
from octet.request import FinishReason


def piece(offset: int, text: str, finish_reason: FinishReason | None = None, *, tokens: int = 1) -> Piece:
    return Piece(
        choice=3,
        offset=offset,
        token_ids=(100 + offset,) * tokens,
        text=text,
        logprobs=(TokenLogprob(token_id=100 + offset, logprob=-1.0),) * tokens,
        finish_reason=finish_reason,
        matched_stop=7 if finish_reason == "stop" else None,
    )


@pytest.fixture
def transcript() -> Transcript:
    """Three tokens; the text of the second came with the third."""
    transcript = Transcript(3)
    for each in (piece(0, "a"), piece(1, ""), piece(2, "bc", "stop")):
        transcript.add(each)
    return transcript


@pytest.mark.parametrize(
    ("first", "token_ids", "text"),
    [(0, (100, 101, 102), "abc"), (1, (101, 102), "bc"), (2, (102,), "bc"), (3, (), "")],
)
def test_it_is_read_from_any_token_on(
    transcript: Transcript, first: int, token_ids: tuple[int, ...], text: str
) -> None:
    read = transcript.read(first)
    assert (read.offset, read.token_ids, read.text) == (first, token_ids, text)
    assert [entry.token_id for entry in read.logprobs] == list(token_ids)
    assert (read.choice, read.finish_reason, read.matched_stop) == (3, "stop", 7)


@pytest.mark.parametrize("first", range(6))
def test_log_probabilities_stand_beside_their_tokens_though_received_ones_have_none(first: int) -> None:
    transcript = Transcript(3)
    for offset in range(2):
        transcript.add(dataclasses.replace(piece(offset, "r"), logprobs=()))
    for offset in range(2, 5):
        transcript.add(piece(offset, "n"))
    transcript.add(piece(5, "held", "aborted", tokens=0))
    assert [entry.token_id for entry in transcript.read(first).logprobs] == list(range(100 + max(first, 2), 105))


def test_what_an_abort_adds_has_no_token() -> None:
    transcript = Transcript(3)
    transcript.add(piece(0, "a"))
    transcript.add(piece(1, "held", "aborted", tokens=0))
    assert (len(transcript), transcript.num_tokens) == (2, 1)
    read = transcript.read(1)
    assert (read.offset, read.token_ids, read.text, read.finish_reason) == (1, (), "held", "aborted")
    assert (transcript.read(2).offset, transcript.read(2).text) == (1, "")
