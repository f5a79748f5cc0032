"""What members say of themselves, or what is known of those that do not answer."""

from __future__ import annotations

import asyncio

import ray

from cluster.asking import answer_of
from cluster.members import MemberStatus
from cluster.pools import Member

_ANSWER_S = 10.0


async def member_status(member: Member) -> MemberStatus:
    """FAILED where its process is gone, SILENT where it does not answer in time."""
    try:
        status: MemberStatus = await asyncio.wait_for(answer_of(lambda: member.actor.status.remote()), _ANSWER_S)
    except ray.exceptions.RayActorError as error:
        return _unknown(member, "FAILED", f"its process is gone ({type(error).__name__})")
    except TimeoutError:
        return _unknown(member, "SILENT", f"no answer within {_ANSWER_S} s")
    return status


def _unknown(member: Member, state: str, reason: str) -> MemberStatus:
    return MemberStatus(worker_id=member.worker_id, node_id="", pid=0, state=state, reason=reason)
