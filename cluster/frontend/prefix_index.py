"""Which prefill worker probably has which prefix: what the frontend remembers of where it sent prompts.

An estimate that only steers: a worker may have evicted the pages, and then computes them again.

Chains of page digests are remembered, not tokens: 16 bytes for a page. A collision would cost a worse choice of worker,
never a wrong answer; what is really cached is decided by `prefill.prefix_cache`, which compares tokens.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

from octet.ids import WorkerId
from octet.messages import pack_ids

_DIGEST_BYTES = 16


class PrefixIndex:
    """Remembers up to `capacity` pages per worker, the least recently sent ones go first."""

    def __init__(self, workers: Sequence[WorkerId], page_size: int, capacity: int) -> None:
        self._page_size, self._capacity = page_size, capacity
        self._chains: dict[WorkerId, OrderedDict[bytes, None]] = {}
        self.set_workers(workers)

    def set_workers(self, workers: Collection[WorkerId]) -> None:
        """Forget those that are gone; new ones have nothing yet."""
        self._chains = {worker: self._chains.get(worker, OrderedDict()) for worker in sorted(workers)}

    def sent(self, worker_id: WorkerId, token_ids: Sequence[int]) -> None:
        chains = self._chains[worker_id]
        for digest in self._digests(token_ids):
            chains[digest] = None
            chains.move_to_end(digest)
        while len(chains) > self._capacity:
            chains.popitem(last=False)

    def cached_tokens(self, token_ids: Sequence[int]) -> dict[WorkerId, int]:
        """For every worker, the tokens of the longest prefix that it was sent before."""
        digests = list(self._digests(token_ids))
        return {worker: self._longest(chains, digests) for worker, chains in self._chains.items()}

    def _longest(self, chains: OrderedDict[bytes, None], digests: list[bytes]) -> int:
        length = 0
        for digest in digests:
            if digest not in chains:
                break
            length += self._page_size
        return length

    def _digests(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        digest = b""
        for first in range(0, len(token_ids) - self._page_size + 1, self._page_size):
            page = pack_ids(token_ids[first : first + self._page_size])
            digest = hashlib.blake2b(digest + page, digest_size=_DIGEST_BYTES).digest()
            yield digest
