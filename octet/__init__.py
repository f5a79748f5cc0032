"""Octet: mixture-of-experts serving with separate prefill, decode and expert pools.

`from octet import Client, AsyncClient` needs neither torch nor Ray.
"""

from octet.client import AsyncClient, CallError, Client

__all__ = ["AsyncClient", "CallError", "Client", "__version__"]
__version__ = "0.1.0"
