"""Who starts, serves, drains and has left, and for how long each has held its GPUs."""

from __future__ import annotations

import dataclasses
from typing import Literal

_State = Literal["starting", "serving", "draining", "left"]


@dataclasses.dataclass(slots=True)
class _Member:
    ordered_s: float
    state: _State = "starting"
    served_s: float = 0.0
    left_s: float = 0.0


class Membership:
    """Members of a pool are numbered as they begin to serve."""

    def __init__(self) -> None:
        self._members: dict[str, list[_Member]] = {}
        self._serving: dict[str, list[int]] = {}

    def order(self, pool: str, now_s: float) -> int:
        members = self._members.setdefault(pool, [])
        members.append(_Member(now_s))
        return len(members) - 1

    def serve(self, pool: str, number: int, now_s: float) -> None:
        member = self._members[pool][number]
        member.state, member.served_s = "serving", now_s
        self._serving.setdefault(pool, []).append(number)

    def drain(self, pool: str, number: int) -> None:
        self._members[pool][number].state = "draining"
        self._serving[pool].remove(number)

    def lose(self, pool: str, number: int, now_s: float) -> None:
        """One that serves is gone from one moment to the next."""
        self._serving[pool].remove(number)
        self.release(pool, number, now_s)

    def release(self, pool: str, number: int, now_s: float) -> None:
        member = self._members[pool][number]
        member.state, member.left_s = "left", now_s

    def serving(self, pool: str) -> list[int]:
        return list(self._serving.get(pool, ()))

    def draining(self, pool: str) -> list[int]:
        return [n for n, member in enumerate(self._members.get(pool, ())) if member.state == "draining"]

    def is_draining(self, pool: str, number: int) -> bool:
        return self._members[pool][number].state == "draining"

    def num_starting(self, pool: str) -> int:
        return sum(member.state == "starting" for member in self._members.get(pool, ()))

    def num_held(self, pool: str) -> int:
        """Members that hold their GPUs."""
        return sum(member.state != "left" for member in self._members.get(pool, ()))

    def age_s(self, pool: str, number: int, now_s: float) -> float:
        """Since it began to serve; those that were there at the start are as old as can be."""
        member = self._members[pool][number]
        return now_s - member.served_s if member.ordered_s > 0 else 1e9

    def member_s(self, pool: str, now_s: float) -> float:
        """Seconds that GPUs were held, over all members, from their order on."""
        return sum(
            (member.left_s if member.state == "left" else now_s) - member.ordered_s
            for member in self._members.get(pool, ())
        )
