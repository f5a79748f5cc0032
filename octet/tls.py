"""Transport security of a client's connection: PEM files in, credentials out."""

from __future__ import annotations

import dataclasses
import pathlib

import grpc

from octet.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How a client makes sure of the server, and, with `cert` and `key`, tells the server who it is."""

    ca: pathlib.Path | None = None
    """Certificates of whom the server's is signed by; None takes the system's."""
    cert: pathlib.Path | None = None
    key: pathlib.Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises: ConfigError for a file that cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=read_pem("tls.ca", self.ca),
            private_key=read_pem("tls.key", self.key),
            certificate_chain=read_pem("tls.cert", self.cert),
        )


def read_pem(field: str, file: str | pathlib.Path | None) -> bytes | None:
    """Raises: ConfigError."""
    if file is None:
        return None
    try:
        return pathlib.Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(field, f"{file}: {error.strerror}", "a readable PEM file") from error
