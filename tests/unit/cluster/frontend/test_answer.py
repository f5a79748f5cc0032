from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.frontend.answer import Answer, Piece, StopStrings
from cluster.planning import EMBEDDED_MODEL
from model.tokenizer import Tokenizer
from octet.ids import RequestId
from octet.messages import TokenEvent, TokenLogprob
from octet.request import FinishReason, Stopping

EOS = 1023
_opened = Tokenizer.open(EMBEDDED_MODEL)
assert _opened is not None
TOKENIZER = _opened


def answer(*stop_strings: str, min_new_tokens: int = 0, tokenizer: Tokenizer | None = TOKENIZER) -> Answer:
    return Answer(0, tokenizer, Stopping(max_new_tokens=1000, min_new_tokens=min_new_tokens), stop_strings)


def event(token_id: int, finish_reason: FinishReason | None = None, logprob: float | None = None) -> TokenEvent:
    return TokenEvent(
        request_id=RequestId("r"),
        choice=0,
        attempt=0,
        index=0,
        token_id=token_id,
        finish_reason=finish_reason,
        logprob=None if logprob is None else TokenLogprob(token_id=token_id, logprob=logprob),
    )


def push_all(into: Answer, token_ids: list[int], last: FinishReason | None = None) -> list[Piece]:
    """Pieces up to the one that ends the choice."""
    pieces: list[Piece] = []
    for number, token_id in enumerate(token_ids):
        pieces.append(into.push(event(token_id, last if number == len(token_ids) - 1 else None)))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def cut(text: str, stop_strings: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; of those that end together the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stop_strings if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


# Few letters, so that stop strings occur, overlap and begin without ending.
_stops = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(st.lists(st.text("ab", max_size=3)), _stops)
def test_the_text_before_the_first_stop_string_comes_out_however_it_is_cut_up(
    parts: list[str], stops: list[str]
) -> None:
    matcher, out, matched = StopStrings(tuple(stops)), "", None
    for part in parts:
        certain, matched = matcher.push(part)
        out += certain
        if matched is not None:
            break
    else:
        out += matcher.finish()
    assert (out, matched) == cut("".join(parts), stops)


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=1), _stops)
def test_only_what_may_become_a_stop_string_is_held_back(parts: list[str], stops: list[str]) -> None:
    text = "".join(parts)
    matcher, out = StopStrings(tuple(stops)), ""
    for part in parts:
        certain, matched = matcher.push(part)
        out += certain
        if matched is not None:
            return
    held = text[len(out) :]
    assert not held or any(stop.startswith(held) for stop in stops)


@given(st.text(st.characters(codec="utf-8"), max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_of_any_text_are_the_text_before_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = TOKENIZER.encode(text)
    pieces = push_all(answer(*stops), [*ids, EOS], last="stop")
    # Decoded again, since the name of a special token is a text, too, and is left out.
    assert text_of(pieces) == cut(TOKENIZER.decode(ids), stops)[0]


@given(st.lists(st.integers(0, 1015), min_size=1, max_size=30), _stops)
def test_pieces_of_any_tokens_are_their_text_before_the_first_stop_string(ids: list[int], stops: list[str]) -> None:
    pieces = push_all(answer(*stops), ids, last="length")
    assert text_of(pieces) == cut(TOKENIZER.decode(ids), stops)[0]


@given(st.text(st.characters(codec="utf-8", min_codepoint=0x80), min_size=1, max_size=12))
def test_no_piece_ends_inside_a_character(text: str) -> None:
    pieces = push_all(answer(), [*TOKENIZER.encode(text), EOS], last="stop")
    ends = ["".join(piece.text for piece in pieces[:count]) for count in range(len(pieces) + 1)]
    assert all(text.startswith(end) for end in ends)


def test_a_stop_string_across_tokens_ends_the_answer() -> None:
    ids = [token_id for letter in "one STOP two" for token_id in TOKENIZER.encode(letter)]
    pieces = push_all(answer("STOP"), ids)
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].matched_stop) == ("one ", "stop", "STOP")


def test_the_token_that_completes_a_stop_string_is_among_the_tokens() -> None:
    ids = [token_id for letter in "abc" for token_id in TOKENIZER.encode(letter)]
    assert [piece.token_ids for piece in push_all(answer("bc"), ids)] == [(token_id,) for token_id in ids]


def test_text_that_turned_out_to_be_no_stop_string_is_returned() -> None:
    ids = [token_id for letter in "abx" for token_id in TOKENIZER.encode(letter)]
    assert [piece.text for piece in push_all(answer("abc"), ids)] == ["", "", "abx"]


def test_held_back_text_is_returned_when_the_length_is_reached() -> None:
    ids = [token_id for letter in "ab" for token_id in TOKENIZER.encode(letter)]
    pieces = push_all(answer("abc"), ids, last="length")
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].matched_stop) == ("ab", "length", None)


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop() -> None:
    ids = [token_id for letter in "abc" for token_id in TOKENIZER.encode(letter)]
    pieces = push_all(answer("bc"), ids, last="length")
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].matched_stop) == ("a", "stop", "bc")


def test_a_stop_id_is_among_the_tokens_but_not_in_the_text() -> None:
    letter = TOKENIZER.encode("x")[0]
    pieces = push_all(answer(), [*TOKENIZER.encode("hi"), letter], last="stop")
    assert text_of(pieces) == "hi"
    assert (pieces[-1].token_ids, pieces[-1].matched_stop) == ((letter,), letter)


def test_held_back_text_is_returned_before_a_stop_id() -> None:
    pieces = push_all(answer("hint"), [*TOKENIZER.encode("hi"), EOS], last="stop")
    assert (text_of(pieces), pieces[-1].matched_stop) == ("hi", EOS)


@pytest.mark.parametrize(("min_new_tokens", "text"), [(0, ""), (1, "a"), (2, "aa"), (3, "aaa"), (4, "aaaa")])
def test_a_stop_string_counts_only_behind_the_minimum(min_new_tokens: int, text: str) -> None:
    ids = TOKENIZER.encode("a") * 6
    pieces = push_all(answer("a", min_new_tokens=min_new_tokens), ids)
    assert (text_of(pieces), pieces[-1].finish_reason) == (text, "stop")


@given(st.integers(0, 8), st.text("ab", max_size=12), _stops)
def test_text_below_the_minimum_is_never_held_back(minimum: int, text: str, stops: list[str]) -> None:
    ids = [token_id for letter in text for token_id in TOKENIZER.encode(letter)][:minimum]
    assert text_of(push_all(answer(*stops, min_new_tokens=minimum), ids)) == TOKENIZER.decode(ids)


def test_an_abort_returns_what_was_held_back() -> None:
    aborted = answer("hint")
    push_all(aborted, TOKENIZER.encode("hi"))
    piece = aborted.abort()
    assert (piece.text, piece.finish_reason, piece.token_ids) == ("hi", "aborted", ())


def test_an_abort_inside_a_character_returns_its_replacement() -> None:
    aborted = answer()
    push_all(aborted, TOKENIZER.encode("漢")[:1])
    assert aborted.abort().text == "\N{REPLACEMENT CHARACTER}"


def test_offsets_count_tokens() -> None:
    counted = answer("hint")
    assert [piece.offset for piece in push_all(counted, TOKENIZER.encode("a")[:1] * 3)] == [0, 1, 2]
    assert counted.abort().offset == 3


def test_a_logprob_goes_with_its_token() -> None:
    piece = answer().push(event(5, logprob=-0.5))
    assert piece.logprobs == (TokenLogprob(token_id=5, logprob=-0.5),)


def test_without_a_tokenizer_there_are_tokens_and_no_text() -> None:
    pieces = push_all(answer(tokenizer=None), [1, 2, 3], last="stop")
    assert [(piece.token_ids, piece.text) for piece in pieces] == [((1,), ""), ((2,), ""), ((3,), "")]


def piece(choice: int, offset: int, text: str, finish_reason: FinishReason | None = None) -> Piece:
    return Piece(choice=choice, offset=offset, token_ids=(offset,), text=text, logprobs=(), finish_reason=finish_reason)
