"""The page pool and its prefix cache: which pages are free, shared, or kept because their content may be asked again.

A page is named by a chain of hashes over everything before and in it (profile, salt, token ids); on a hit the token
ids themselves are compared, for a hash alone is never trusted. Only full pages are kept; those nobody uses are given
up least recently used first, the ends of texts before their beginnings. Knows nothing of what pages hold.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from gnomon.kernels.batch import PAGE


@dataclass(frozen=True)
class _Kept:
    """A full page's name and content."""

    key: bytes
    token_ids: tuple[int, ...]


class PagePool:
    """Pages 0..count-1, reference-counted."""

    def __init__(self, count: int, fingerprint: str) -> None:
        self.count = count
        self.fingerprint = fingerprint
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._kept: dict[int, _Kept] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # kept pages without users, oldest first

    @property
    def available(self) -> int:
        """Pages that could be handed out now, idle ones included."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.count - self.available

    def allocate(self) -> int | None:
        """A page of one's own; None when every page is in use."""
        if self._free:
            page = self._free.pop()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        else:
            return None
        self._users[page] = 1
        return page

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back, last first, so that the end of a text is given up before its beginning."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._kept:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def chain(self, token_ids: Sequence[int], salt: str) -> list[bytes]:
        """The names of the full pages of a text, in order."""
        key = hashlib.sha256(f"{self.fingerprint}\0{salt}".encode()).digest()
        keys = []
        for start in range(0, len(token_ids) - PAGE + 1, PAGE):
            key = hashlib.sha256(key + array("q", token_ids[start : start + PAGE]).tobytes()).digest()
            keys.append(key)
        return keys

    def find(self, keys: Sequence[bytes], token_ids: Sequence[int]) -> list[int]:
        """Pages that already hold the beginning of this text; each gains a user."""
        found: list[int] = []
        for place, key in enumerate(keys):
            page = self._page_of.get(key)
            if page is None or self._kept[page].token_ids != tuple(token_ids[place * PAGE : (place + 1) * PAGE]):
                break
            found.append(page)
        for page in found:
            self._users[page] += 1
            self._idle.pop(page, None)
        return found

    def holds(self, key: bytes) -> bool:
        return key in self._page_of

    def keep(self, page: int, key: bytes, token_ids: Sequence[int]) -> None:
        """This page is full and may be found from now on; a second page of the same content is not kept."""
        if key not in self._page_of and page not in self._kept:
            self._page_of[key] = page
            self._kept[page] = _Kept(key, tuple(token_ids))

    def flush(self, fingerprint: str) -> None:
        """The weights changed: nothing that was computed may be found again."""
        self.fingerprint = fingerprint
        for page in list(self._kept):
            self._forget(page)
        self._free.extend(self._idle)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        kept = self._kept.pop(page)
        del self._page_of[kept.key]
