"""Calls of actors whose answers may be lost on their way."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from ray.exceptions import ActorUnavailableError

_T = TypeVar("_T")

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
