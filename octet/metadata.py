"""Keys of the gRPC metadata."""

REQUEST_ID = "octet-request-id"
"""Initial metadata: the call's request is accepted, and has this id."""
RETRY_PUSHBACK_MS = "grpc-retry-pushback-ms"
"""Trailing metadata of a refusal: when to try again, as in gRPC's retry design (gRFC A6)."""
