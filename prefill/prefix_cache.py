"""Finds the KV of a prompt's beginning among pages that were computed before.

Full pages are chained: a page is known by the page before it and by its own token ids, which are compared as they are.
A hit is therefore never wrong, and finding one takes a look-up per page (as in the block tables of vLLM and the radix
tree of SGLang). The pool keeps the pages and decides which of them go, least recently released first; pages that are
held, by requests or leases, never do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from model.pages import PagePool
from octet.messages import pack_ids

_ROOT = 0
_Key = tuple[int, bytes]


class PrefixCache:
    """Belongs to the engine's thread, as its pool does."""

    def __init__(self, pool: PagePool, lookahead: int = 0) -> None:
        """
        Args:
            lookahead: tokens after a page that its content depends on as well; 1 where it holds an MTP layer's KV,
                which at each position is of the next token. A page is then known by them, too.
        """
        self._pool, self._lookahead = pool, lookahead
        self._entries: dict[_Key, tuple[int, int]] = {}
        self._keys: dict[int, _Key] = {}
        # Never used twice: what hung on a page that is gone cannot be found from its successor.
        self._numbers = itertools.count(_ROOT + 1)

    def __len__(self) -> int:
        """Pages that can be found."""
        return len(self._entries)

    def find(self, token_ids: Sequence[int]) -> list[int]:
        """The cached pages of the longest known beginning, not yet shared.

        The last token is always left to compute: its hidden state is what the next one is sampled from.
        """
        pages: list[int] = []
        parent = _ROOT
        for key_ids in self._full_pages(token_ids, len(token_ids) - 1):
            entry = self._entries.get((parent, key_ids))
            if entry is None:
                break
            parent, page = entry
            pages.append(page)
        return pages

    def add(self, token_ids: Sequence[int], pages: Sequence[int]) -> None:
        """Make the full pages of a computed prompt known, while the caller still holds them."""
        parent = _ROOT
        for key_ids, page in zip(self._full_pages(token_ids, len(token_ids)), pages, strict=False):
            key = (parent, key_ids)
            if key not in self._entries:
                self._entries[key] = (next(self._numbers), page)
                self._keys[page] = key
                self._pool.keep(page, self._forget)
            parent, _ = self._entries[key]

    def _forget(self, page: int) -> None:
        del self._entries[self._keys.pop(page)]

    def _full_pages(self, token_ids: Sequence[int], num_tokens: int) -> list[bytes]:
        size = self._pool.page_size
        known = min(num_tokens, len(token_ids) - self._lookahead)
        ends = range(size, known + 1, size)
        return [pack_ids(token_ids[end - size : end + self._lookahead]) for end in ends]
