"""Which worker answers which rows, and what becomes of the rows of one that dies. Knows nothing of Ray."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from llava_cli.batch.ranges.row_range import RowRange

CAREFUL_AFTER = 2
"""Deaths of workers at the same rows, after which these are asked one at a time: the next one tells at which row."""
MOST_RANGES = 8
"""That a worker gets at a time: it has no pause between them."""
_ROUNDS = 2
"""Works for each worker, at least, that what is left is divided into towards the end."""


@dataclass(frozen=True)
class Work:
    """What a worker has in hand: ranges that it answers and commits, or a single row that it only answers."""

    ranges: tuple[RowRange, ...]
    row: int | None = None
    """A row of the only range, whose workers have died before."""


class AnsweredRows(NamedTuple):
    """Rows of a range that were asked alone."""

    rows: RowRange
    begin: int
    """The row of the first line; those before it are in an attempt that a dead worker has left."""
    lines: list[bytes | None]
    """Of neighboring rows; None for one that has ended its worker, which can only be the last one."""

    @property
    def is_whole(self) -> bool:
        """Whether they are the range's last ones."""
        return self.begin + len(self.lines) == self.rows.end


class Dispatch:
    """Hands out the ranges of a run, each until it is committed.

    A worker that dies because its node is lost was at no fault. One that dies with its node in place may have been
    ended by a row, of any of its ranges, since pictures are read ahead: each of these ranges is then a work of its own.
    After `CAREFUL_AFTER` such deaths the rows of a range are handed out one by one, to any workers, until one of them
    ends its worker. That one is answered with an error, and the rows behind it are handed out as a range again.
    """

    def __init__(self, ranges: Iterable[RowRange], left: Callable[[RowRange], int] = lambda rows: 0) -> None:
        """`ranges` are drawn as they are needed; `left` tells how many rows of a range earlier attempts have left."""
        self._fresh, self._left = iter(ranges), left
        self._ahead = deque[RowRange]()
        self._suspects = deque[RowRange]()
        self._alone: dict[int, _Alone] = {}
        self._open = set[int]()
        """The numbers of ranges that were drawn and are not committed."""
        self._deaths = Counter[int]()
        """By the number of a range."""
        self.deaths_in_a_row = 0
        """Of workers with their node in place, since the last range or row that came: whether it is worth going on."""

    def next(self, workers: int) -> Work | None:
        """Work for one of so many workers; None if all is handed out. Less at a time towards the end."""
        for alone in self._alone.values():
            if (row := alone.next()) is not None:
                return Work((alone.rows,), row)
        works = _ROUNDS * workers
        self._look_ahead(works * MOST_RANGES)
        size = min(MOST_RANGES, max(1, len(self._ahead) // works))
        ranges = self._take(self._suspects, 1) or self._take(self._ahead, size)
        return Work(ranges) if ranges else None

    def committed(self, rows: RowRange) -> None:
        """A range has been committed, by anybody."""
        self.deaths_in_a_row = 0
        self._open.discard(rows.number)
        self._alone.pop(rows.number, None)
        del self._deaths[rows.number]

    def answered(self, work: Work, line: bytes) -> None:
        """The row of a work with a single one."""
        self.deaths_in_a_row = 0
        if work.row is not None and (alone := self._alone.get(work.ranges[0].number)):
            alone.end(work.row, line)

    def died(self, work: Work, node_is_lost: bool) -> None:
        """The worker that had this work is gone; what it has not committed is handed out again.

        A worker that gives its work back is as good as one with a node that is lost.
        """
        self.deaths_in_a_row += not node_is_lost
        if work.row is None:
            for rows in reversed(work.ranges):
                if rows.number in self._open:
                    self._hand_out_again(rows, is_suspect=not node_is_lost)
        elif alone := self._alone.get(work.ranges[0].number):
            if node_is_lost:
                alone.give_back(work.row)
            else:
                alone.end(work.row, None)

    def complete(self) -> list[AnsweredRows]:
        """Rows that were asked alone, for the driver to write: it commits the range if they are the last ones.

        Otherwise it leaves them as an attempt, before it calls `next`: the range is handed out again.
        """
        complete = [alone for alone in self._alone.values() if alone.is_complete]
        for alone in complete:
            del self._alone[alone.rows.number]
            self._deaths[alone.rows.number] = CAREFUL_AFTER - 1
            self._suspects.appendleft(alone.rows)  # left out by `next` once it is committed
        return [alone.result() for alone in complete]

    @property
    def is_done(self) -> bool:
        """Whether everything is committed."""
        self._look_ahead(1)
        return not self._open

    def _look_ahead(self, most: int) -> None:
        while len(self._ahead) < most and (rows := next(self._fresh, None)) is not None:
            self._ahead.append(rows)
            self._open.add(rows.number)

    def _take(self, queue: deque[RowRange], most: int) -> tuple[RowRange, ...]:
        """The next ranges of a queue that nobody has committed meanwhile."""
        taken: list[RowRange] = []
        while queue and len(taken) < most:
            rows = queue.popleft()
            if rows.number in self._open:
                taken.append(rows)
        return tuple(taken)

    def _hand_out_again(self, rows: RowRange, is_suspect: bool) -> None:
        self._deaths[rows.number] += is_suspect
        deaths = self._deaths[rows.number]
        if deaths >= CAREFUL_AFTER and (left := self._left(rows)) < len(rows):
            self._alone[rows.number] = _Alone(rows, left)
        else:
            (self._suspects if deaths else self._ahead).appendleft(rows)


class _Alone:
    """A range whose rows are asked one at a time, from the first one without an answer to one that ends its worker."""

    def __init__(self, rows: RowRange, left: int) -> None:
        self.rows, self._begin, self._end = rows, rows.begin + left, rows.end
        self._to_ask = [*range(self._begin, rows.end)]
        """A heap."""
        self._lines: dict[int, bytes | None] = {}

    def next(self) -> int | None:
        """A row to ask; None if all are asked."""
        return heapq.heappop(self._to_ask) if self._to_ask and self._to_ask[0] < self._end else None

    def give_back(self, row: int) -> None:
        """The row is to be asked again."""
        heapq.heappush(self._to_ask, row)

    def end(self, row: int, line: bytes | None) -> None:
        """The row's line; None if it has ended its worker, so that no row behind it is asked alone."""
        self._lines[row] = line
        if line is None:
            self._end = min(self._end, row + 1)

    @property
    def is_complete(self) -> bool:
        return all(row in self._lines for row in range(self._begin, self._end))

    def result(self) -> AnsweredRows:
        return AnsweredRows(self.rows, self._begin, [self._lines[row] for row in range(self._begin, self._end)])
