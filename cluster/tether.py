"""What ties a detached process to its cluster: it outlives the controller's process, and not the controller.

Ray ends an actor that is not detached with the process that started it, and members must live on while another
controller takes the place of theirs.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import ray

_RETRY_S = 1.0
_ANSWER_S = 60.0
"""The controller answers after a third of it."""


class Tether:
    """Holds calls of the controller open, one after the other; ends this process if none follows a lost controller,
    or if the controller has ended it, of which a process that is cut off does not hear in time."""

    def __init__(self, controller: Any, name: str = "") -> None:
        """
        Args:
            name: the member's id; a service has none.
        """
        self._controller, self._name = controller, name
        if controller is not None:
            threading.Thread(target=self._hold, name="tether", daemon=True).start()

    def _hold(self) -> None:
        while True:
            try:
                if not ray.get(self._controller.presence.remote(self._name), timeout=_ANSWER_S):
                    os._exit(1)
            except ray.exceptions.ActorDiedError:
                # Nobody is left who could stop it in order, nor anybody to serve with.
                os._exit(1)
            except ray.exceptions.RayError:
                # It is busy or stopped, or another one is on its way.
                time.sleep(_RETRY_S)
