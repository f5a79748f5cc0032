"""What members say of themselves, or what is known of those that do not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import ray

from cluster.actors import answer_of
from cluster.control.pools import Member
from cluster.members import MemberStatus
from octet.errors import UnavailableError
from octet.ids import WorkerId

_ANSWER_S = 5.0
"""Whoever asks for the status of all waits for the last of them."""
_Waiting = Callable[[WorkerId, Awaitable[MemberStatus]], Awaitable[MemberStatus]]


async def member_status(member: Member, unless_parted: _Waiting | None = None) -> MemberStatus:
    """FAILED where its process is gone or it is lost meanwhile, SILENT where it does not answer in time.

    Args:
        unless_parted: see `Membership`.
    """
    asked = asyncio.wait_for(answer_of(lambda: member.actor.status.remote()), _ANSWER_S)
    try:
        status = await (asked if unless_parted is None else unless_parted(member.worker_id, asked))
    except UnavailableError as error:
        return _unknown(member, "FAILED", str(error))
    except ray.exceptions.RayActorError as error:
        return _unknown(member, "FAILED", f"its process is gone ({type(error).__name__})")
    except TimeoutError:
        return _unknown(member, "SILENT", f"no answer within {_ANSWER_S} s")
    return status


def _unknown(member: Member, state: str, reason: str) -> MemberStatus:
    return MemberStatus(worker_id=member.worker_id, node_id="", pid=0, state=state, reason=reason)
