"""Which KV pages are whose: pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Sequence


class PagePool:
    """Counts references to `num_pages` pages. A page is free when nobody holds it.

    A sequence's page table is a plain list of page numbers, in order of position.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None if there are not so many."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page: another page table holds it too."""
        for page in pages:
            assert self._references[page] > 0, "a free page cannot be shared"
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self._references[page] > 0, "a free page cannot be released"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def slots(self, pages: Sequence[int], start: int, stop: int) -> list[int]:
        """The flat KV slots (`page · page_size + offset`) of positions start..stop of a page table."""
        size = self.page_size
        return [pages[position // size] * size + position % size for position in range(start, stop)]
