"""How commands reach a frontend: its address, and how they make sure of it where its port speaks TLS."""

from __future__ import annotations

import contextvars
import pathlib
from typing import Annotated

import typer

from octet.client import Client
from octet.tls import Tls

DEFAULT_ADDRESS = "127.0.0.1:50051"
Address = Annotated[str, typer.Option("--grpc", help="host:port of a frontend.")]

_secured: contextvars.ContextVar[Tls | None] = contextvars.ContextVar("_secured", default=None)


def secure(
    tls: Annotated[bool, typer.Option("--tls", envvar="OCTET_TLS", help="The system knows who signed it.")] = False,
    tls_ca: Annotated[
        pathlib.Path | None, typer.Option(envvar="OCTET_TLS_CA", help="PEM: who signs the server's certificate.")
    ] = None,
    tls_cert: Annotated[
        pathlib.Path | None, typer.Option(envvar="OCTET_TLS_CERT", help="PEM: a certificate of ours, if it asks.")
    ] = None,
    tls_key: Annotated[pathlib.Path | None, typer.Option(envvar="OCTET_TLS_KEY", help="PEM: its key.")] = None,
) -> None:
    """Options of the whole command line, before a command's name."""
    _secured.set(Tls(ca=tls_ca, cert=tls_cert, key=tls_key) if tls or tls_ca or tls_cert or tls_key else None)


def connect(address: str, timeout_s: float) -> Client:
    """With what `secure` was told. Raises: ConfigError for a file that cannot be read."""
    return Client(address, timeout_s, tls=_secured.get())
