"""Calls of actors that are played: whose failure it was, and answers that are lost on their way."""

from __future__ import annotations

import asyncio

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

from cluster.actors import answer_of, call
from octet.errors import ChangeRefusedError, StartupError, UnavailableError
from tests.unit.cluster.played import soon


class Losing:
    """Ray loses so many of its answers in a row."""

    def __init__(self, num_lost: int) -> None:
        self.num_lost, self.num_asked = num_lost, 0

    async def ask(self) -> int:
        self.num_asked += 1
        if self.num_asked <= self.num_lost:
            raise ActorUnavailableError("lost", None)
        return 7


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.actors._PAUSE_S", 0.0)


@pytest.mark.parametrize("num_lost", [0, 1, 2])
async def test_an_answer_that_is_lost_is_asked_for_again(num_lost: int) -> None:
    actor = Losing(num_lost)
    assert await soon(answer_of(actor.ask)) == 7
    assert actor.num_asked == num_lost + 1


async def test_three_answers_in_a_row_are_not_lost_by_chance() -> None:
    actor = Losing(3)
    with pytest.raises(ActorUnavailableError):
        await soon(answer_of(actor.ask))
    assert actor.num_asked == 3


async def test_a_process_that_has_died_is_not_asked_again() -> None:
    asked = []

    async def ask() -> None:
        asked.append(1)
        raise ActorDiedError

    with pytest.raises(ActorDiedError):
        await soon(answer_of(ask))
    assert len(asked) == 1


def task_error(cause: Exception) -> ray.exceptions.RayTaskError:
    """As Ray wraps what an actor's method raises."""
    return ray.exceptions.RayTaskError("method", "traceback", cause)


async def raising(error: Exception) -> None:
    raise error


async def test_a_typed_error_of_a_call_comes_through_and_any_other_says_whose_it_was() -> None:
    with pytest.raises(ChangeRefusedError, match="not now"):
        await soon(call("decode-0", raising(task_error(ChangeRefusedError("not now")))))
    with pytest.raises(StartupError, match="decode-0: "):
        await soon(call("decode-0", raising(task_error(ZeroDivisionError("a mistake")))))
    with pytest.raises(UnavailableError, match=r"decode-0: its process is gone \(ActorDiedError\)") as caught:
        await soon(call("decode-0", raising(ActorDiedError())))
    assert isinstance(caught.value.__cause__, ActorDiedError), "whoever replaces it looks for this"


async def test_a_call_that_is_not_answered_in_time_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"decode-0: no answer within 0\.01 s"):
        await soon(call("decode-0", asyncio.Event().wait(), 0.01))
