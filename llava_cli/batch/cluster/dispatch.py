"""Which worker answers which rows, and what becomes of the rows of one that dies. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llava_cli.batch.ranges.row_range import RowRange

CAREFUL_AFTER = 2
"""Deaths of workers at the same rows, after which these are asked one at a time: the next one tells at which row."""
MOST_RANGES = 8
"""That a worker gets at a time: it has no pause between them."""


@dataclass(frozen=True)
class Work:
    """What a worker has in hand: ranges that it answers and commits, or a single row that it only answers."""

    ranges: tuple[RowRange, ...]
    row: int | None = None
    """A row of the only range, whose worker has died before."""


class Dispatch:
    """Hands out the ranges of a run, each until it is committed.

    A worker that dies because its node is lost was at no fault. One that dies with its node in place may have been
    ended by a row: after `CAREFUL_AFTER` such deaths the rows of the range that it was at are handed out one by one,
    to any workers; the one that ends its worker then is answered with an error.
    """

    def __init__(self, ranges: Iterable[RowRange]) -> None:
        """`ranges` are drawn as they are needed."""

    def next(self, workers: int) -> Work | None:
        """Work for one of so many workers; None if all is handed out. Less at a time towards the end."""
        raise NotImplementedError

    def committed(self, rows: RowRange) -> None:
        """A range of a work has been committed."""

    def answered(self, work: Work, line: bytes) -> None:
        """The row of a work with a single one."""

    def died(self, work: Work, node_is_lost: bool) -> None:
        """The worker that had this work is gone; what it has not committed is handed out again."""

    def complete(self) -> list[tuple[RowRange, list[bytes | None]]]:
        """Ranges whose rows were all handed out one by one, for the driver to commit; None for an error."""
        raise NotImplementedError

    @property
    def is_done(self) -> bool:
        """Whether everything is committed."""
        raise NotImplementedError
