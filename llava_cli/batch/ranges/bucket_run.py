"""A shared run beside an object of a bucket."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from llava_cli.batch.ranges.row_range import Grid, RowRange, Shard
from llava_cli.batch.ranges.shared_run import Attempt, OnRow
from llava_cli.batch.tasks import Task


class BucketRun:
    """Ranges are committed by puts that never replace an object."""

    grid: Grid

    def __init__(self, url: str) -> None:
        self.name = str(url)

    def saved_precision(self) -> str | None:
        raise NotImplementedError

    def begin(self, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]], shard: Shard | None) -> None:
        raise NotImplementedError

    def leave_token(self) -> str:
        raise NotImplementedError

    def sees(self, token: str) -> bool:
        raise NotImplementedError

    @property
    def is_merged(self) -> bool:
        raise NotImplementedError

    def answered(self) -> int:
        raise NotImplementedError

    def has(self, rows: RowRange) -> bool:
        raise NotImplementedError

    def missing(self, ranges: Iterable[RowRange]) -> Iterator[RowRange]:
        raise NotImplementedError

    def tasks(self, rows: RowRange) -> Iterator[Task]:
        raise NotImplementedError

    def attempt(self, rows: RowRange) -> Attempt:
        raise NotImplementedError

    def merge(self, on_row: OnRow) -> None:
        raise NotImplementedError
