"""Which KV pages are whose: pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class PagePool:
    """Counts references to `num_pages` pages. A page is free when nobody holds it.

    A page whose content may be wanted again can be *kept*: it is free all the same, but it is given out last, the one
    that was released first before the others, and until then `share` takes it back with what it holds. A sequence's
    page table is a plain list of page numbers, in order of position.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._empty = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._forget: dict[int, Callable[[int], None]] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._kept)

    def num_held(self, pages: Sequence[int]) -> int:
        """How many of these somebody holds."""
        return sum(self._references[page] > 0 for page in pages)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None if there are not so many."""
        if count > self.num_free:
            return None
        pages = [self._empty.pop() if self._empty else self._oldest_kept() for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def keep(self, page: int, forget: Callable[[int], None]) -> None:
        """Keep what a held page holds, once nobody holds it; `forget` is told when the page is given out anew."""
        assert self._references[page] > 0, "a free page cannot be kept"
        self._forget[page] = forget

    def share(self, pages: Sequence[int]) -> None:
        """Add a reference to each page: another page table holds it too."""
        for page in pages:
            if self._references[page] == 0:
                assert page in self._kept, "a free page cannot be shared"
                del self._kept[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drop a reference of each page; of kept ones, the last in a page table are given out first."""
        for page in reversed(pages):
            assert self._references[page] > 0, "a free page cannot be released"
            self._references[page] -= 1
            if self._references[page] > 0:
                continue
            if page in self._forget:
                self._kept[page] = None
            else:
                self._empty.append(page)

    def _oldest_kept(self) -> int:
        page, _ = self._kept.popitem(last=False)
        self._forget.pop(page)(page)
        return page

    def slots(self, pages: Sequence[int], start: int, stop: int) -> list[int]:
        """The flat KV slots (`page · page_size + offset`) of positions start..stop of a page table."""
        size = self.page_size
        return [pages[position // size] * size + position % size for position in range(start, stop)]
