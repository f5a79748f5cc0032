"""Octet: mixture-of-experts serving with separate prefill, decode and expert pools.

`from octet import Client, AsyncClient` needs neither torch nor Ray.
"""

from octet.client import AsyncClient, CallError, Client
from octet.tls import Tls

__all__ = ["AsyncClient", "CallError", "Client", "Tls", "__version__"]
__version__ = "0.1.0"
