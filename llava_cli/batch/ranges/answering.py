"""Ranges -> rows -> attempts: what a shard and a worker of a cluster have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import islice

from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.ranges.row_range import RowRange
from llava_cli.batch.ranges.shared_run import Attempt, OnRow, SharedRun
from llava_cli.batch.run import Job, fill_of
from llava_cli.batch.runner import answer_tasks, sampled
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine


def answer_ranges(
    job: Job,
    run: SharedRun,
    ranges: Iterable[RowRange],
    engine: Engine,
    loader: PictureLoader,
    on_row: OnRow,
    on_range: Callable[[RowRange], None],
    go_on: Callable[[], bool],
) -> None:
    """Answers ranges one after the other, without a pause between them; those that somebody has answered are left out.

    Calls `on_row` for each row, and `on_range` for each range that is committed then, by this process or another one.
    Once `go_on()` is false, only the answers that were begun are finished, and the last range's attempt is kept.
    Raises as `SharedRun` does.
    """
    begun = deque[tuple[RowRange, Attempt]]()

    def tasks() -> Iterator[Task]:
        for rows in ranges:
            if not go_on():
                return
            if run.has(rows):
                on_range(rows)
                continue
            attempt = run.attempt(rows)
            begun.append((rows, attempt))
            rest = enumerate(islice(run.tasks(rows), attempt.done, None), rows.begin + attempt.done)
            yield from sampled(rest, job.sight, run.grid.total) if job.sight else (task for _, task in rest)

    def commit_complete() -> None:
        while begun and begun[0][1].done == len(begun[0][0]):
            rows, attempt = begun.popleft()
            with closing(attempt):
                attempt.commit()
            on_range(rows)

    try:
        for task, row in answer_tasks(engine, tasks(), loader, job.settings, job.size, go_on, fill_of(job)):
            commit_complete()  # of rows that earlier attempts have left
            begun[0][1].append(row)
            on_row(task, row)
            commit_complete()
        commit_complete()
    finally:
        for _, attempt in begun:
            attempt.close()
