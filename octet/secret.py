"""The secret of a cluster: whoever knows it is a member, and whoever does not is a stranger."""

from __future__ import annotations

import hashlib
import hmac
import secrets

NUM_BYTES = 32
SIGNATURE_BYTES = 32


class ClusterSecret:
    """Drawn once for each cluster; its members get it with the plan that they are started with.

    Never shown: neither its `repr` nor an error tells it.
    """

    __slots__ = ("_data",)

    def __init__(self, data: bytes) -> None:
        """
        Args:
            data: `NUM_BYTES` bytes.
        """
        if len(data) != NUM_BYTES:
            raise ValueError(f"a cluster's secret: found {len(data)} bytes, expected {NUM_BYTES}")
        self._data = data

    @classmethod
    def draw(cls) -> ClusterSecret:
        return cls(secrets.token_bytes(NUM_BYTES))

    def key(self, purpose: str) -> bytes:
        """Another 32 bytes for each purpose, none of which tells the secret or another key."""
        return self.sign("key", purpose.encode())

    def sign(self, purpose: str, data: bytes) -> bytes:
        """32 bytes that only a member can make of `data`: HMAC-SHA256."""
        return hmac.digest(self._data, purpose.encode() + b"\0" + data, hashlib.sha256)

    def has_signed(self, purpose: str, data: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(purpose, data), signature)

    def __repr__(self) -> str:
        return "ClusterSecret(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClusterSecret) and hmac.compare_digest(self._data, other._data)

    def __hash__(self) -> int:
        return hash(self._data)
