"""What all writers of a shared run see: its settings, its manifest, and a file for each range that is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from llava_cli.batch.ranges.row_range import Grid, RowRange, Shard
from llava_cli.batch.tasks import Task

OnRow = Callable[[Task, dict[str, Any]], None]


class Attempt(Protocol):
    """Somebody's rows of a range, in order; under a name of its own until the first who has all of them commits them.

    An attempt that was ended leaves its rows, and the next one begins with them: `done` says how many they are.
    """

    @property
    def done(self) -> int:
        """How many rows there are."""

    def append(self, row: dict[str, Any]) -> None:
        """Raises `OutputError`."""

    def commit(self) -> bool:
        """Makes its rows those of the range; False if another attempt was first. Raises `OutputError`."""

    def close(self) -> None:
        """Leaves its rows for the next attempt, unless they are committed. Raises `OutputError`."""


class SharedRun(Protocol):
    """The state of a run beside its output: in a folder that all machines share, or in a bucket.

    It can be pickled, and means the same to every process that sees the same files.
    """

    name: str
    """Of the output, as in messages."""
    grid: Grid
    """Of its rows; known once it is begun."""

    def saved_precision(self) -> str | None:
        """As `Journal.saved_precision`."""

    def begin(self, settings: dict[str, Any], tasks: Callable[[], Iterable[Task]], shard: Shard | None) -> None:
        """Starts or joins the run; of several that start it at once, one has its tasks taken, which are read only then.

        Raises as `Journal.begin`, `OutputTaken` if a run that is not shared has the output, and `OutputError`.
        """

    @property
    def is_merged(self) -> bool:
        """Whether the output has all rows, and nothing else of the run is left."""

    def leave_token(self) -> str:
        """Puts a file beside the manifest, and returns its name; the merge removes it. Raises `OutputError`."""

    def sees(self, token: str) -> bool:
        """Whether this process has the same files as the one that has left the token."""

    def answered(self) -> int:
        """How many rows the output has already, in order."""

    def has(self, rows: RowRange) -> bool:
        """Whether a range is answered, by anybody, or has become part of the output."""

    def missing(self, ranges: Iterable[RowRange]) -> Iterator[RowRange]:
        """Those of the ranges that nobody has answered, as of now."""

    def tasks(self, rows: RowRange) -> Iterator[Task]:
        """The tasks of a range. Raises `BadData`."""

    def attempt(self, rows: RowRange) -> Attempt:
        """A new attempt at a range. Raises `OutputError`."""

    def merge(self, on_row: OnRow) -> bool:
        """Joins the files of all ranges to the output, durably, and then removes them; calls `on_row` for each row.

        False, after any calls of `on_row`, if another process has done so before.
        What a merge that was ended has done stays. Raises `BadData` for ranges that are missing or damaged, which it
        names, `OutputTaken` where another process is merging, and `OutputError`.
        """
