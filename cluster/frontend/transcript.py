"""What one choice has said so far, to be read from any token on."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from cluster.frontend.answer import MatchedStop, Piece
from octet.messages import TokenLogprob
from octet.request import FinishReason

_TOKEN_BYTES, _LOGPROB_BYTES = 80, 120
"""Of a token with its text, and of a log-probability, as CPython objects."""


class Transcript:
    """An entry per token, with the text that became certain with it; after an abort, one more without a token."""

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._token_ids = array("I")
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._matched_stop: MatchedStop | None = None

    def __len__(self) -> int:
        """Entries."""
        return len(self._texts)

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def num_bytes(self) -> int:
        """Roughly what it occupies."""
        return _TOKEN_BYTES * len(self) + logprob_bytes(self._logprobs)

    def token_ids(self, num_tokens: int) -> list[int]:
        """The first tokens."""
        return self._token_ids[:num_tokens].tolist()

    def add(self, piece: Piece) -> None:
        """The next piece of the choice: of one token, or the one that ends it."""
        self._token_ids.extend(piece.token_ids)
        self._texts.append(piece.text)
        self._logprobs.extend(piece.logprobs)
        self.finish_reason, self._matched_stop = piece.finish_reason, piece.matched_stop

    def read(self, first: int) -> Piece:
        """Everything from entry `first` on, which is also the number of the first token."""
        # Of the tokens that its client had received before, which come first, there are none.
        without = self.num_tokens - len(self._logprobs)
        return Piece(
            choice=self._choice,
            offset=min(first, self.num_tokens),
            token_ids=tuple(self._token_ids[first:]),
            text="".join(self._texts[first:]),
            logprobs=tuple(self._logprobs[max(0, first - without) :]),
            finish_reason=self.finish_reason,
            matched_stop=self._matched_stop,
        )


def logprob_bytes(logprobs: Sequence[TokenLogprob]) -> int:
    """Roughly what they occupy, with their alternatives."""
    return _LOGPROB_BYTES * sum(1 + len(entry.top) for entry in logprobs)
