"""Drafting for a decode step: with the MTP head, as many tokens as pay.

Shapes: `B` sequences, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from decode.batch import DecodeBatch, RunningSequence
from decode.draft_length import DraftLength
from model.batch import Span
from model.runner import ModelRunner
from model.sampler import sample
from octet.config import SpeculationConfig
from octet.errors import ExpertMissingError

_log = logging.getLogger(__name__)

_MOST_UNSEEN = 32
"""Positions of a sequence whose hidden states wait while nothing is drafted."""


class Drafter(Protocol):
    """Guesses what comes next. Its guesses cost or save time, and never change a token."""

    def draft(self, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        """At most so many tokens after the last of each sequence. Raises: LaneError, and then nothing has changed."""

    def note(
        self,
        sequences: Sequence[RunningSequence],
        drafts: Sequence[Sequence[int]],
        hidden: Sequence[torch.Tensor],
    ) -> None:
        """The sequences have grown.

        Args:
            drafts: what `draft` gave for this step, if it was asked.
            hidden: final hidden states `[new tokens, H]` of the positions before each new token.
        """


class MtpDrafter:
    """Drafts with the checkpoint's own head.

    A sequence keeps the hidden states of the positions that the head has not seen yet. Of all but the last it needs
    only keys and values; the last one gives the first draft, whose output in turn gives the second, and so on.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def draft(self, sequences: Sequence[RunningSequence], lengths: Sequence[int]) -> list[list[int]]:
        self._catch_up(sequences)
        drafts: list[list[int]] = [[] for _ in sequences]
        rows = list(range(len(sequences)))
        hidden_BH = torch.cat([sequence.unseen[-1] for sequence in sequences])
        for depth in range(max(lengths, default=0)):
            going_on = [row for row, index in enumerate(rows) if lengths[index] > depth]
            if len(going_on) < len(rows):
                rows, hidden_BH = [rows[row] for row in going_on], hidden_BH[going_on]
            hidden_BH = self._runner.draft([_ahead(sequences[index], drafts[index]) for index in rows], hidden_BH)
            choices = [sequences[index].sample_row(drafts[index]) for index in rows]
            # With the noise of its position a draft is the token sampled there, as far as the head knows the model.
            for index, token_id in zip(rows, sample(self._runner.logits(hidden_BH), choices), strict=True):
                # A head whose numbers overflow drafts as badly as any.
                drafts[index].append(max(token_id, 0))
        return drafts

    def note(
        self,
        sequences: Sequence[RunningSequence],
        drafts: Sequence[Sequence[int]],
        hidden: Sequence[torch.Tensor],
    ) -> None:
        for sequence, drafted, new_TH in zip(sequences, drafts, hidden, strict=True):
            if drafted:
                sequence.unseen.clear()
            sequence.unseen.append(new_TH)
        if any(sum(map(len, sequence.unseen)) > _MOST_UNSEEN for sequence in sequences):
            self._catch_up(sequences)

    def _catch_up(self, sequences: Sequence[RunningSequence]) -> None:
        """Show the head all positions but the last. A step that is run again does not harm by doing so again."""
        spans, hidden = [], []
        for sequence in sequences:
            unseen_TH = torch.cat(sequence.unseen)
            sequence.unseen[:] = [unseen_TH[-1:]]
            num_behind, stop = len(unseen_TH) - 1, len(sequence.token_ids) - 1
            if num_behind > 0:
                ahead = sequence.token_ids[stop - num_behind : stop]
                spans.append(Span(token_ids=ahead, start=stop - 1 - num_behind, pages=sequence.pages))
                hidden.append(unseen_TH[:-1])
        if spans:
            self._runner.write_draft_kv(spans, hidden)


class Speculator:
    """Decides how much to draft, has it drafted, and keeps count of what came of it."""

    def __init__(
        self, drafter: Drafter, config: SpeculationConfig, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._drafter, self._clock = drafter, clock
        self._most = config.num_speculative_tokens
        self._policy = DraftLength(self._most) if config.adaptive else None
        self._length, self._started_s = 0, 0.0
        self.num_drafted = self.num_accepted = 0

    def draft(self, batch: DecodeBatch) -> list[list[int]]:
        """Tokens for each running sequence that may come next, with pages for them.

        Raises: LaneError, and then nothing has changed but the pages, until `DecodeBatch.trim`.
        """
        self._started_s = self._clock()
        sequences = batch.running
        self._length = self._policy.choose(len(sequences)) if self._policy is not None else self._most
        lengths = [batch.make_room(sequence, min(self._length, sequence.num_left - 1)) for sequence in sequences]
        if not any(lengths):
            return [[] for _ in sequences]
        try:
            return self._drafter.draft(sequences, lengths)
        except ExpertMissingError as error:
            # An answer without drafts lacks nothing, it only comes one token at a time.
            _log.warning("nothing is drafted in this step: %s", error)
            return [[] for _ in sequences]

    def note(
        self, sequences: Sequence[RunningSequence], drafts: Sequence[Sequence[int]], hidden: Sequence[torch.Tensor]
    ) -> None:
        """Take account of a step that is done.

        Args:
            sequences: all of the step, also those that ended with it.
            hidden: `[new tokens, H]` of each sequence, at the positions before its new tokens.
        """
        num_accepted = num_tested = 0
        for sequence, drafted, new_TH in zip(sequences, drafts, hidden, strict=True):
            right = _num_agreeing(sequence.token_ids[-len(new_TH) :], drafted)
            num_accepted += right
            num_tested += min(len(new_TH), len(drafted))
        self.num_drafted += sum(map(len, drafts))
        self.num_accepted += num_accepted
        going_on = [index for index, sequence in enumerate(sequences) if not sequence.ended]
        self._drafter.note(
            [sequences[index] for index in going_on],
            [drafts[index] for index in going_on],
            [hidden[index] for index in going_on],
        )
        if self._policy is not None:
            step_s = self._clock() - self._started_s
            self._policy.observe(len(sequences), self._length, tested=num_tested, accepted=num_accepted, step_s=step_s)


def _num_agreeing(token_ids: Sequence[int], drafted: Sequence[int]) -> int:
    pairs = zip(token_ids, drafted, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _ahead(sequence: RunningSequence, drafted: Sequence[int]) -> Span:
    """The last token, or the last draft, at the position before it."""
    start = len(sequence.token_ids) - 2 + len(drafted)
    return Span(token_ids=(drafted or sequence.token_ids)[-1:], start=start, pages=sequence.pages, by_token=True)
