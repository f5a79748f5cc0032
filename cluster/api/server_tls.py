"""Transport security of the gRPC server."""

from __future__ import annotations

import grpc

from octet.config import TlsConfig
from octet.tls import read_pem


def server_credentials(config: TlsConfig) -> grpc.ServerCredentials | None:
    """None where the server shall speak in the clear. Raises: ConfigError for a file that cannot be read."""
    key, cert = read_pem("frontend.tls.key", config.key), read_pem("frontend.tls.cert", config.cert)
    if key is None or cert is None:
        return None
    client_ca = read_pem("frontend.tls.client_ca", config.client_ca)
    return grpc.ssl_server_credentials(
        [(key, cert)], root_certificates=client_ca, require_client_auth=client_ca is not None
    )
