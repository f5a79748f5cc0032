"""What frontends wrote down of each request: what must hold of it, and that it is what clients saw. Pure."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

from ops.chaos.history import Commit, Stream
from ops.chaos.violations import Found, Kind, Violation, about


@dataclasses.dataclass(slots=True)
class _Life:
    """Of a request at one frontend, from its acceptance to its end."""

    num_tokens: dict[int, int]
    """By choice: those that its client had already, and those committed since."""
    attempts: dict[int, int] = dataclasses.field(default_factory=dict)
    """By choice, the newest of which a token was committed."""
    outcomes: list[str] = dataclasses.field(default_factory=list)
    """Of its ends: one, once it is over."""


class Journals:
    """Of all frontends. Each token is the live attempt's next one, from a member; what was accepted ends once."""

    def __init__(self, commits: Sequence[Commit]) -> None:
        """
        Args:
            commits: one frontend's after the other's, the last of which was there at the end.
        """
        self._members: dict[str, tuple[str, ...]] = {}
        self._lives: dict[tuple[str, str], list[_Life]] = {}
        """By frontend and request."""
        self._last: dict[str, _Life] = {}
        """By request: the last one, at the last frontend that accepted it."""
        self._committed: dict[tuple[str, int], set[int]] = collections.defaultdict(set)
        """By request and choice: indices, whoever wrote them."""
        self.violations = [violation for commit in commits for violation in self._take(commit)]
        lost = list(dict.fromkeys(commit.frontend for commit in commits))[:-1]
        self.violations += self._ends(lost)

    def differences(self, stream: Stream) -> Found:
        """Every token that came was committed, and an answer that came whole is one that was finished."""
        if not stream.accepted and not stream.deltas:
            return
        life = self._last.get(stream.request_id)
        if life is None:
            yield about(stream, "journal and stream differ", "no frontend wrote that it was accepted")
            return
        whole = [status for _, status in stream.endings] == ["OK"]
        for choice in range(stream.question.num_choices):
            came = len(stream.ids(choice))
            missing = set(range(came)) - self._committed[stream.request_id, choice]
            if missing:
                found = f"choice {choice}: {came} tokens came, token {min(missing)} was never committed"
                yield about(stream, "journal and stream differ", found)
            elif whole and life.num_tokens.get(choice, 0) < came:
                found = f"choice {choice}: {came} tokens came, the last journal has {life.num_tokens.get(choice, 0)}"
                yield about(stream, "journal and stream differ", found)
        if whole and "finished" not in life.outcomes:
            found = f"it ended OK, the last journal {', '.join(life.outcomes) or 'has no end'}"
            yield about(stream, "journal and stream differ", found)

    def _take(self, commit: Commit) -> Found:
        lives = self._lives.get((commit.frontend, commit.request_id), [])
        match commit.kind:
            case "workers":
                self._members[commit.frontend] = commit.workers
            case "accept":
                # An id whose request was cancelled or failed may be asked again: that is another life.
                life = self._last[commit.request_id] = _Life(dict(enumerate(commit.received)))
                self._lives[commit.frontend, commit.request_id] = [*lives, life]
            case "commit":
                yield from self._commit(commit, lives[-1] if lives else None)
            case "end" if lives:
                lives[-1].outcomes.append(commit.outcome)
            case "end":
                yield _of(commit, "journal out of order", "an end before it was accepted")

    def _commit(self, commit: Commit, life: _Life | None) -> Found:
        if commit.worker not in self._members.get(commit.frontend, ()):
            found = f"token {commit.index} of {commit.worker}, which is no member"
            yield _of(commit, "old epoch committed", found)
        if life is None:
            yield _of(commit, "journal out of order", "a token before it was accepted")
            return
        newest = life.attempts.get(commit.choice, commit.attempt)
        life.attempts[commit.choice] = max(newest, commit.attempt)
        if commit.attempt < newest:
            found = f"token {commit.index} of attempt {commit.attempt} after attempt {newest}"
            yield _of(commit, "old epoch committed", found)
        num_tokens = life.num_tokens.get(commit.choice, 0)
        if commit.index != num_tokens:
            found = f"choice {commit.choice}: token {commit.index} after {num_tokens} tokens"
            yield _of(commit, "journal out of order", found)
        life.num_tokens[commit.choice] = commit.index + 1
        self._committed[commit.request_id, commit.choice].add(commit.index)
        if life.outcomes:
            yield _of(commit, "journal out of order", "a token after the request's end")

    def _ends(self, lost: Sequence[str]) -> Found:
        """
        Args:
            lost: frontends that another has taken the place of.
        """
        for (frontend, request_id), lives in self._lives.items():
            for life in lives:
                # One that was lost wrote down no end of what it had.
                cut_off = frontend in lost and life is lives[-1] and not life.outcomes
                if len(life.outcomes) != 1 and not cut_off:
                    found = f"{len(life.outcomes)} times"
                    yield Violation(kind="request ended not once", subject=request_id, found=found)
            if any("finished" in life.outcomes for life in lives[:-1]):
                # Its answer was kept, which another frontend does not know.
                found = "accepted again by the frontend that had finished it"
                yield Violation(kind="computed twice", subject=request_id, found=found)


def _of(commit: Commit, kind: Kind, found: str) -> Violation:
    return Violation(kind=kind, subject=commit.request_id, found=found)
