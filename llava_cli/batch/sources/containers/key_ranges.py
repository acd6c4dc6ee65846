"""Ranges of the keys of a bucket, which several threads list at once: which range is split, and where.

Nothing here asks a server. Python compares strings as S3 compares keys, which it does by their UTF-8 bytes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isqrt
from string import ascii_lowercase, ascii_uppercase, digits

_FREE_SPLITS = 20
_PAGES_PER_SPLIT = 4
"""Each split may cost a request: one that finds nothing, or that finds again what the range below it has read."""
_CLASSES = (digits, ascii_uppercase, ascii_lowercase)
_LIKELY = "".join(_CLASSES)
"""Of what names are mostly made, in its order."""
_SURROGATES = range(0xD800, 0xE000)
"""Code points that are no characters."""
_CODE_POINTS = 0x110000


class Unordered(Exception):
    """A server does not list keys in their order, or not from where it was asked to: there are no ranges."""


@dataclass(eq=False)
class KeyRange:
    """Keys behind `start`, up to `end`. The first range of all has no start, the last one no end."""

    start: str | None = None
    end: str | None = None
    token: str | None = None
    """Of the next page; none before the first."""
    places: list[tuple[int, int]] = field(default_factory=list)
    """Where its pages are on disk."""
    is_done: bool = False
    first: str = ""
    last: str | None = None
    """The keys that were read first and last."""
    pages: int = 0
    """That were read since it was split."""
    is_splitting: bool = False
    """Whether the range that was split off has not been read yet."""
    below: KeyRange | None = None
    """From which it was split off, until it has been read."""


class KeyRanges:
    """All ranges of a bucket's keys, in their order; for one thread at a time.

    A range is split where more of its keys are thought to be. Wherever that is, each key belongs to one range.
    """

    def __init__(self) -> None:
        self.all = [KeyRange()]
        self.active = [*self.all]
        """Those with keys that have not been read."""
        self._pages = self._splits = 0

    def split(self) -> KeyRange | None:
        """A new range, for a thread that has none to read; `None` if there must be more pages before the next split."""
        if self._splits >= _FREE_SPLITS + self._pages // _PAGES_PER_SPLIT:
            return None
        for below in sorted(self.active, key=lambda one: -one.pages):
            middle = None
            if below.last is not None and not below.is_splitting:
                middle = midpoint(below.first, below.last, below.end)
            if middle is not None:
                above = KeyRange(middle, below.end, below=below)
                below.end, below.is_splitting, below.pages = middle, True, 0
                self.all.insert(self.all.index(below) + 1, above)
                self.active.append(above)
                self._splits += 1
                return above
        return None

    def add(self, part: KeyRange, keys: Sequence[str], token: str | None) -> int:
        """Takes in the next page of a range, and the token of the one behind it. Returns how many of its keys, from the
        first on, belong to the range. Raises `Unordered`."""
        before = part.start if part.last is None else part.last
        if any(a >= b for a, b in pairwise(keys)) or (keys and before is not None and keys[0] <= before):
            raise Unordered
        count = len(keys) if part.end is None else bisect_right(keys, part.end)
        if count:
            part.first, part.last = keys[0] if part.last is None else part.first, keys[count - 1]
            part.pages += 1
            self._pages += 1
        part.token = token
        part.is_done = token is None or count < len(keys) or (count > 0 and part.last == part.end)
        if part.is_done:
            self.active.remove(part)
        if part.below:
            part.below.is_splitting, part.below = False, None
        return count


def midpoint(first: str, last: str, end: str | None) -> str | None:
    """A string between `last` and `end`, as near to the middle of the keys there as can be told; `None` if none is.

    `first` to `last` are keys that were read. What is before their first difference has changed in none of them, and
    it is not known which part of that changes up to the end: half of it is tried.
    """
    shared = 0 if end is None else _shared(last, end)
    for place in range(max(shared, (shared + _shared(first, last)) // 2), len(last) + 1):
        low = ord(last[place]) if place < len(last) else -1
        high = ord(end[place]) if end is not None and place == shared else _CODE_POINTS
        if (between := _between(low, high)) is not None:
            return last[:place] + chr(between)
    return None


def _shared(a: str, b: str) -> int:
    """How many characters two strings begin with in common."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _between(low: int, high: int) -> int | None:
    """A code point between two: of the same class as the lower one, or else of a likely one, or else near to it."""
    of_class = next((one for one in _CLASSES if low >= 0 and chr(low) in one), "")
    for characters in (of_class, _LIKELY):
        if likely := [ord(one) for one in characters if low < ord(one) < high]:
            return likely[len(likely) // 2]
    middle = low + isqrt(high - low)  # alphabets stand close together in a large space
    if low < ord(_LIKELY[-1]) or not low < middle < high or middle in _SURROGATES:
        return None
    return middle
