"""Actors by name, and calls of them: whose failure it was, and answers that are lost on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnavailableError

from octet.errors import OctetError, StartupError, UnavailableError

_T = TypeVar("_T")

TASK_EVENTS = False
"""Ray's GCS would keep an event of every call, of which the watch makes several a second."""

_LOST_IN_A_ROW = 3
"""So many answers, one after the other, are not lost by chance."""
_PAUSE_S = 0.1


async def answer_of(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask, and ask again where Ray has lost the answer and does not say that the process has died.

    Args:
        ask: a call that may be carried out more than once.

    Raises: what the call raises; ActorUnavailableError when three answers in a row were lost.
    """
    for _ in range(_LOST_IN_A_ROW - 1):
        try:
            return await ask()
        except ActorUnavailableError:
            await asyncio.sleep(_PAUSE_S)
    return await ask()


async def call(name: str, awaitable: Awaitable[_T], timeout_s: float | None = None) -> _T:
    """Await an actor call; its own typed errors come through, anything else says whose it was.

    Raises: OctetError; UnavailableError if the process is gone or does not answer in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await awaitable
    except TimeoutError:
        raise UnavailableError(f"{name}: no answer within {timeout_s} s") from None
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OctetError):
            raise cause from None
        raise StartupError(f"{name}: {error}") from error
    except ray.exceptions.RayActorError as error:
        raise UnavailableError(f"{name}: its process is gone ({_why(error)})") from error


def _why(error: ray.exceptions.RayActorError) -> str:
    """Of one that could not even be made, Ray tells the traceback, whose last line says what the matter is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    made = not lines or "creation task" not in lines[0]
    return type(error).__name__ if made else lines[-1]


class Gone:
    """In place of an actor that there is no more: whatever it is asked fails as with one whose process has died."""

    def __getattr__(self, name: str) -> Gone:
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    async def remote(self, *args: object, **kwargs: object) -> Any:
        raise ray.exceptions.RayActorError


def find(name: str, namespace: str) -> Any:
    """An actor by its name, or `Gone`."""
    try:
        return ray.get_actor(name, namespace=namespace)
    except ValueError:
        return Gone()


def kill(actor: Any) -> None:
    """At once, whatever it does. Idempotent."""
    if not isinstance(actor, Gone):
        ray.kill(actor)
