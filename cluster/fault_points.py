"""How faults are armed in a cluster's processes: a call that every actor answers, and whoever makes it."""

from __future__ import annotations

import os
import socket
from typing import Any

import ray

from octet import faults
from octet.errors import OctetError, UnavailableError
from octet.faults import Fault, Struck

_ANSWER_S = 5.0


class FaultCalls:
    """What every actor of a cluster answers. It takes no fault unless `chaos.enabled` is true."""

    def process(self) -> tuple[str, int]:
        """The machine that this process runs on, and its pid there."""
        return socket.gethostname(), os.getpid()

    def arm(self, fault: Fault) -> None:
        """Let a fault strike this process. Raises: ConfigError."""
        faults.arm(fault)

    def disarm(self) -> tuple[Struck, ...]:
        """Forget every fault that is armed. Returns: those that have struck."""
        faults.disarm()
        return faults.struck()

    def struck(self) -> tuple[Struck, ...]:
        """The faults that have struck."""
        return faults.struck()


def pid_of(namespace: str, name: str) -> int:
    """For signals. Raises: UnavailableError if the actor does not answer, or runs on another machine."""
    host, pid = _ask(namespace, name, "process")
    if host != socket.gethostname():
        raise UnavailableError(f"{name} runs on {host}, where no signal reaches it from here")
    return int(pid)


def arm(namespace: str, name: str, fault: Fault) -> None:
    """Arm a fault in an actor. Raises: ConfigError; UnavailableError if it does not answer."""
    _ask(namespace, name, "arm", fault)


def disarm(namespace: str, name: str) -> tuple[Struck, ...]:
    """See `FaultCalls.disarm`. Raises: UnavailableError."""
    found: tuple[Struck, ...] = _ask(namespace, name, "disarm")
    return found


def struck(namespace: str, name: str) -> tuple[Struck, ...]:
    """See `FaultCalls.struck`. Raises: UnavailableError."""
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
