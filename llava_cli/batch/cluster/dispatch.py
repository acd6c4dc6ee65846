"""Which worker answers which rows, and what becomes of the rows of one that dies. Knows nothing of Ray."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from llava_cli.batch.ranges.row_range import RowRange

CAREFUL_AFTER = 2
"""Deaths of workers at the same rows, after which these are asked one at a time: the next one tells at which row."""
MOST_RANGES = 8
"""That a worker gets at a time: it has no pause between them."""
_ROUNDS = 2
"""Works for each worker, at least, that what is left is divided into towards the end."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a worker has in hand: ranges that it answers and commits, or a single row that it only answers."""

    ranges: tuple[RowRange, ...]
    row: int | None = None
    """The number of a row of the only range, whose workers have died before."""


class AnsweredRows(NamedTuple):
    """Neighboring rows of a range that were asked alone."""

    rows: RowRange
    begin: int
    """The number of the first one; those before it are in an attempt that a dead worker has left."""
    answers: list[Row | None]
    """None for a row that has ended its worker, which can only be the last one."""

    def after(self, done: int) -> list[Row | None]:
        """What follows the first `done` rows of the range; nothing if there is a gap between them."""
        first = self.rows.begin + done - self.begin
        return self.answers[first:] if first >= 0 else []


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

    def answered(self, work: Work, row: Row) -> None:
        """The row of a work with a single one."""
        self.deaths_in_a_row = 0
        if work.row is not None and (alone := self._alone.get(work.ranges[0].number)):
            alone.end(work.row, row)

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
        """Rows that were asked alone, for the driver to write to an attempt, which it commits if it is whole then.

        Otherwise it leaves it as it is, before it calls `next`: the range is handed out again.
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
        return self.uncommitted(1) == 0

    def uncommitted(self, most: int) -> int:
        """How many ranges are not committed; no more than `most` are counted."""
        self._look_ahead(most)
        return min(len(self._open), most)

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
        self._answers: dict[int, Row | None] = {}

    def next(self) -> int | None:
        """The number of a row to ask; None if all are asked."""
        return heapq.heappop(self._to_ask) if self._to_ask and self._to_ask[0] < self._end else None

    def give_back(self, number: int) -> None:
        """A row is to be asked again."""
        heapq.heappush(self._to_ask, number)

    def end(self, number: int, row: Row | None) -> None:
        """A row is answered, or has ended its worker, so that no row behind it is asked alone."""
        self._answers[number] = row
        if row is None:
            self._end = min(self._end, number + 1)

    @property
    def is_complete(self) -> bool:
        return all(row in self._answers for row in range(self._begin, self._end))

    def result(self) -> AnsweredRows:
        return AnsweredRows(self.rows, self._begin, [self._answers[row] for row in range(self._begin, self._end)])
