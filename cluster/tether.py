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


class Tether:
    """Holds a call of the controller open, which ends with its process; ends this process if no other one follows."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller
        if controller is not None:
            threading.Thread(target=self._hold, name="tether", daemon=True).start()

    def _hold(self) -> None:
        while True:
            try:
                ray.get(self._controller.presence.remote())
            except ray.exceptions.ActorDiedError:
                # Nobody is left who could stop it in order, nor anybody to serve with.
                os._exit(1)
            except ray.exceptions.RayError:
                # Another one is on its way.
                time.sleep(_RETRY_S)
