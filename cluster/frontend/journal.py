"""What a frontend knows of a live request: the one record from which any worker's loss can be made good."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable

from octet.messages import Evicted, PrefillRequest, TokenEvent, pack_ids, unpack_ids


@dataclasses.dataclass(slots=True)
class _Choice:
    attempt: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False


class Journal:
    """Commits each token of each choice exactly once, in order, from the live attempt alone."""

    def __init__(
        self, request: PrefillRequest, most_choices: Callable[[int], int] = lambda num_tokens: sys.maxsize
    ) -> None:
        """
        Args:
            most_choices: for how many choices that share so many tokens a decode worker has pages; by default for any.
        """
        self._request, self._most_choices = request, most_choices
        self._choices = {choice: _Choice(request.attempt) for choice in request.choices}

    @property
    def request(self) -> PrefillRequest:
        return self._request

    @property
    def num_completion_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self._choices.values())

    @property
    def ended(self) -> bool:
        return all(choice.ended for choice in self._choices.values())

    def live_choices(self) -> list[int]:
        return [number for number, choice in self._choices.items() if not choice.ended]

    def token_ids(self, choice: int) -> list[int]:
        return list(self._choices[choice].token_ids)

    def num_tokens(self, choice: int) -> int:
        return len(self._choices[choice].token_ids)

    def attempt(self, choice: int) -> int:
        return self._choices[choice].attempt

    def commit(self, event: TokenEvent) -> bool:
        """Whether the token is the next one of its choice's live attempt; anything else is dropped."""
        if not self.is_live(event.choice, event.attempt):
            return False
        choice = self._choices[event.choice]
        if event.index != len(choice.token_ids):
            return False
        choice.token_ids.append(event.token_id)
        return True

    def end(self, choice: int) -> None:
        self._choices[choice].ended = True

    def has_ended(self, choice: int) -> bool:
        return choice in self._choices and self._choices[choice].ended

    def is_live(self, choice: int, attempt: int) -> bool:
        """Whether events of this attempt count; a choice that the request does not have is never live."""
        known = self._choices.get(choice)
        return known is not None and not known.ended and attempt == known.attempt

    def restart(self, event: Evicted) -> PrefillRequest | None:
        """The request that computes an evicted choice again, or None if the eviction is not of the live attempt."""
        return self.compute_again((event.choice,))[0] if self.is_live(event.choice, event.attempt) else None

    def compute_again(self, choices: Iterable[int]) -> list[PrefillRequest]:
        """The requests that compute live choices again, each as a new attempt, from the tokens committed to it.

        Choices with the same tokens share one: the first token is not there yet, and neither is what sets them apart.
        But no more of them than a decode worker has pages for: with what was committed they take more than by their
        prompt, and what fits nowhere would hold up all that waits behind it.
        """
        alike: dict[tuple[int, ...], list[int]] = {}
        for number in choices:
            alike.setdefault(tuple(self._choices[number].token_ids), []).append(number)
        requests = []
        for token_ids, numbers in alike.items():
            most = self._most_choices(self._request.num_tokens + len(token_ids))
            parts = [numbers[first : first + most] for first in range(0, len(numbers), most)]
            requests += [self._again(part, token_ids) for part in parts]
        return requests

    def _again(self, numbers: list[int], token_ids: tuple[int, ...]) -> PrefillRequest:
        """No two requests share an attempt, so that an abort of one never ends another."""
        attempt = max(choice.attempt for choice in self._choices.values()) + 1
        for number in numbers:
            self._choices[number].attempt = attempt
        return dataclasses.replace(
            self._request,
            attempt=attempt,
            choices=tuple(numbers),
            token_ids=pack_ids([*unpack_ids(self._request.token_ids), *token_ids]),
        )
