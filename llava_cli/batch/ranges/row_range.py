"""The rows of a run in ranges: the unit that a shard or a cluster's worker answers, and commits as one file.

Ranges follow from the number of rows alone, so that machines which do not know each other have the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llava_cli.errors import UsageError

MOST_ROWS = 1000
"""In a range: what is answered anew if its worker and all that it wrote are lost."""
LEAST_RANGES = 64
"""Where there are as many rows: fewer would keep a cluster's last workers waiting for one of them."""


class RowRange(NamedTuple):
    """Rows `begin` to `end` - 1, counted from 0."""

    number: int
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def file_name(self) -> str:
        """Of its rows, beside the manifest."""
        return f"part-{self.number:05d}.jsonl"


class Grid:
    """The ranges of a run of `total` rows."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.size = max(1, min(MOST_ROWS, total // LEAST_RANGES))
        """Rows in a range, but for the last one."""
        self.count = -(-total // self.size)

    def range(self, number: int) -> RowRange:
        begin = number * self.size
        return RowRange(number, begin, min(begin + self.size, self.total))

    def all(self) -> Iterator[RowRange]:
        return map(self.range, range(self.count))

    def of_shard(self, shard: Shard) -> Iterator[RowRange]:
        """Neighbors: so that a shard reads few of the archives of a source."""
        return map(self.range, range(self._first(shard.number - 1, shard), self._first(shard.number, shard)))

    def _first(self, number: int, shard: Shard) -> int:
        return self.count * number // shard.count


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of a run, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


ALL = Shard(1, 1)


def parse_shard(text: str) -> Shard:
    """The value of --shard. Raises `UsageError`."""
    found = re.fullmatch("([0-9]{1,7})/([0-9]{1,7})", text)
    shard = Shard(*map(int, found.groups())) if found else Shard(0, 0)
    if not 1 <= shard.number <= shard.count:
        raise UsageError("--shard", f"{text!r} is no part of all, counted from 1", "--shard 3/8 is the third of eight")
    return shard
