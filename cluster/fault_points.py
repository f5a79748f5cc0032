"""How faults are armed in a cluster's processes: a call that every actor answers, and whoever makes it."""

from __future__ import annotations

import os
from typing import Any

import ray

from octet import faults
from octet.errors import OctetError, UnavailableError
from octet.faults import Fault, Struck

_ANSWER_S = 5.0


class FaultPoints:
    """What every actor of a cluster answers. It takes no fault unless `chaos.enabled` is true."""

    def pid(self) -> int:
        return os.getpid()

    def arm(self, fault: Fault) -> int:
        """Let a fault strike this process. Returns: its pid. Raises: ConfigError."""
        faults.arm(fault)
        return os.getpid()

    def disarm(self) -> tuple[Struck, ...]:
        """Forget every fault that is armed. Returns: those that have struck."""
        faults.disarm()
        return faults.struck()

    def struck(self) -> tuple[Struck, ...]:
        """The faults that have struck."""
        return faults.struck()


def arm(namespace: str, name: str, fault: Fault) -> int:
    """Arm a fault in an actor. Returns: its pid. Raises: ConfigError; UnavailableError if it does not answer."""
    pid: int = _ask(namespace, name, "arm", fault)
    return pid


def pid_of(namespace: str, name: str) -> int:
    """Raises: UnavailableError if the actor does not answer."""
    pid: int = _ask(namespace, name, "pid")
    return pid


def disarm(namespace: str, name: str) -> tuple[Struck, ...]:
    """See `FaultPoints.disarm`. Raises: UnavailableError."""
    found: tuple[Struck, ...] = _ask(namespace, name, "disarm")
    return found


def struck(namespace: str, name: str) -> tuple[Struck, ...]:
    """See `FaultPoints.struck`. Raises: UnavailableError."""
    found: tuple[Struck, ...] = _ask(namespace, name, "struck")
    return found


def _ask(namespace: str, name: str, method: str, *args: object) -> Any:
    """Needs this process's connection to Ray."""
    try:
        actor = ray.get_actor(name, namespace=namespace)
        return ray.get(getattr(actor, method).remote(*args), timeout=_ANSWER_S)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, OctetError):
            raise cause from None
        raise UnavailableError(f"{name}: {error}") from error
    except (ValueError, ray.exceptions.RayError) as error:
        raise UnavailableError(f"{name} does not answer: {error}") from error
