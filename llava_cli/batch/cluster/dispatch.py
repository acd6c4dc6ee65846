"""Which worker answers which rows, and what becomes of the rows of one that dies. Knows nothing of Ray."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from llava_cli.batch.ranges.row_range import RowRange

CAREFUL_AFTER = 2
"""Deaths of workers at a range, after which its rows are asked one at a time: the next one tells at which row."""
MOST_RANGES = 8
"""That a worker gets at a time: it has no pause between them."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a worker has in hand: ranges that it answers and commits, or a single row that it only answers."""

    ranges: tuple[RowRange, ...]
    row: int | None = None
    """The number of a row of the only range, at which workers have died."""


@dataclass
class _ByRow:
    """A range whose rows are handed out one by one."""

    rows: RowRange
    waiting: deque[int]
    answers: dict[int, Row | None] = field(default_factory=dict)


class Dispatch:
    """Hands out the ranges of a run, each until it is committed.

    A worker that dies because its node is lost was at no fault. One that dies with its node in place may have been
    ended by a row of the first range that it had not committed: after `CAREFUL_AFTER` such deaths the rows of the range
    are handed out one by one, to any workers; the one that ends its worker then is answered with an error.
    """

    def __init__(self, ranges: Iterable[RowRange], count: int) -> None:
        """`ranges` are drawn as they are needed, `count` is how many there are."""
        self._fresh = iter(ranges)
        self._again: deque[RowRange] = deque()
        """Ranges of workers that are gone."""
        self._by_row: dict[int, _ByRow] = {}
        self._deaths: Counter[int] = Counter()
        self._open: set[int] = set()
        """Ranges that are handed out and not committed."""
        self.left = count
        """Ranges that are not committed."""

    @property
    def is_done(self) -> bool:
        """Whether everything is committed."""
        return self.left == 0

    def next(self, workers: int) -> Work | None:
        """Work for one of so many workers; None if all is handed out. Less at a time towards the end."""
        for one in self._by_row.values():
            if one.waiting:
                return Work((one.rows,), one.waiting.popleft())
        most = max(1, min(MOST_RANGES, (self.left - len(self._open)) // (4 * workers)))
        ranges = tuple(self._drawn(most))
        self._open.update(rows.number for rows in ranges)
        return Work(ranges) if ranges else None

    def _drawn(self, most: int) -> Iterator[RowRange]:
        """Neighbors, as far as there are some; one at a time of those that were handed out before."""
        if self._again:
            yield self._again.popleft()
            return
        for _ in range(most):
            if (rows := next(self._fresh, None)) is None:
                return
            yield rows

    def committed(self, rows: RowRange) -> None:
        """A range has been committed: by its worker, or by another attempt."""
        self._open.discard(rows.number)
        self._by_row.pop(rows.number, None)
        self._deaths.pop(rows.number, None)
        self.left -= 1

    def answered(self, work: Work, row: Row | None) -> None:
        """The row of a work with a single one; None if its worker died at it."""
        assert work.row is not None
        self._by_row[work.ranges[0].number].answers[work.row] = row

    def lost(self, work: Work, committed: set[int], node_is_lost: bool) -> None:
        """The worker that had this work is gone; what it has not committed is handed out again."""
        if work.row is not None:
            if node_is_lost:
                self._by_row[work.ranges[0].number].waiting.append(work.row)
            else:
                self.answered(work, None)
            return
        left = [rows for rows in work.ranges if rows.number not in committed]
        if left and not node_is_lost:
            self._deaths[left[0].number] += 1
        for rows in reversed(left):
            if self._deaths[rows.number] < CAREFUL_AFTER:
                self._again.appendleft(rows)
                self._open.discard(rows.number)
            else:
                self._by_row[rows.number] = _ByRow(rows, deque(range(rows.begin, rows.end)))

    def complete(self) -> Iterator[tuple[RowRange, list[Row | None]]]:
        """Ranges whose rows were all answered one by one, for the driver to commit; None for one that has killed."""
        for one in list(self._by_row.values()):
            if len(one.answers) == len(one.rows):
                yield one.rows, [one.answers[number] for number in range(one.rows.begin, one.rows.end)]
