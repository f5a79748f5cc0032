"""From committed tokens to the pieces of text that a client sees, for one choice."""

from __future__ import annotations

import dataclasses

from model.tokenizer import IncrementalDetokenizer, Tokenizer
from octet.messages import TokenEvent, TokenLogprob
from octet.request import FinishReason, Stopping

MatchedStop = str | int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one or more tokens add to a choice."""

    choice: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None = None
    matched_stop: MatchedStop | None = None


class StopStrings:
    """Cuts a growing text before the first stop string, holding back what might become one."""

    def __init__(self, stop_strings: tuple[str, ...]) -> None:
        self._stop_strings = stop_strings
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that ends it, if one is complete.

        Of several that match, the one that is complete first counts, whatever pieces the text comes in; of those that
        end together, the longest.
        """
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            return self._held[:at], stop
        keep = self._partial()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain, None

    def finish(self) -> str:
        """What was held back and never became a stop string."""
        held, self._held = self._held, ""
        return held

    def _partial(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop_strings):
                return length
        return 0


class Answer:
    """Turns one choice's committed events into pieces. Concatenated pieces are the whole answer."""

    def __init__(
        self, choice: int, tokenizer: Tokenizer | None, stopping: Stopping, stop_strings: tuple[str, ...]
    ) -> None:
        self._choice, self._stopping = choice, stopping
        self._detokenizer: IncrementalDetokenizer | None = tokenizer.detokenizer() if tokenizer else None
        self._stop_strings = StopStrings(stop_strings)
        self._num_tokens = 0

    def push(self, event: TokenEvent) -> Piece:
        """The piece of one token. Its `finish_reason` may come from a stop string, before the worker knows of it."""
        offset, self._num_tokens = self._num_tokens, self._num_tokens + 1
        finish_reason = event.finish_reason
        matched: MatchedStop | None
        if finish_reason == "stop":
            # An id that ends the answer is among its tokens, but not in its text.
            (text, _), matched = self._last(), event.token_id
        else:
            text, matched = self._decode(event.token_id)
            if matched is None and finish_reason is not None:
                tail, matched = self._last()
                text += tail
            if matched is not None:
                finish_reason = "stop"
        return Piece(
            choice=self._choice,
            offset=offset,
            token_ids=(event.token_id,),
            text=text,
            logprobs=(event.logprob,) if event.logprob is not None else (),
            finish_reason=finish_reason,
            matched_stop=matched,
        )

    def abort(self) -> Piece:
        """The piece that ends a choice nobody goes on with."""
        return Piece(
            choice=self._choice,
            offset=self._num_tokens,
            token_ids=(),
            text=self._last()[0],
            logprobs=(),
            finish_reason="aborted",
        )

    def _decode(self, token_id: int) -> tuple[str, str | None]:
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.push(token_id)
        if self._num_tokens <= self._stopping.min_new_tokens:
            return self._stop_strings.finish() + text, None
        return self._stop_strings.push(text)

    def _last(self) -> tuple[str, str | None]:
        """The detokenizer's last characters may still complete a stop string."""
        if self._detokenizer is None:
            return "", None
        text, matched = self._stop_strings.push(self._detokenizer.finish())
        return (text, matched) if matched is not None else (text + self._stop_strings.finish(), None)
