"""Whether a batch that begins waits for those who are about to come: pure.

A step reads most weights however few sequences it advances. Where prompts of a burst are computed on the cores that
decode shares, steps of the first few sequences cost those that come a chunk later more than they gain, and in the end
the first ones as well: all of them end later. So the first sequences of an empty batch wait while the next chunk of
their prefill worker brings more. Nobody waits who has been advanced before, and nobody for long.
"""

from __future__ import annotations

from octet.ids import WorkerId


class Gathering:
    """Told of every offer and abort; asked before every step."""

    def __init__(self, longest_s: float) -> None:
        """
        Args:
            longest_s: that a sequence waits; 0 for never.
        """
        self._longest_s = longest_s
        self._following: dict[WorkerId, int] = {}
        self._since_s: float | None = None
        self._begun, self._burst = False, False

    def note(self, source: WorkerId, following: int) -> None:
        """An offer has come; the last one of a worker says how many of its next chunk will follow."""
        self._following[source] = following
        self._burst = self._burst or following > 0

    def forget(self) -> None:
        """Who was about to come may not come."""
        self._following.clear()
        self._burst = False

    def empty(self) -> None:
        """The batch holds nobody: the next to come are its first."""
        self._since_s, self._begun = None, False

    def waits(self, now_s: float, num_arriving: int) -> bool:
        """Whether a batch that holds somebody is not to be advanced yet.

        Args:
            num_arriving: offers whose pages are on their way.
        """
        if self._begun:
            return False
        if self._since_s is None:
            self._since_s = now_s
        awaited = self._burst and num_arriving + sum(self._following.values()) > 0
        if awaited and now_s - self._since_s < self._longest_s:
            return True
        self._begun = True
        # Whoever did not come may be gone, and would be waited for with the next burst of another.
        self.forget()
        return False
