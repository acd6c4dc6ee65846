"""`llava batch --shard I/N`: answers its part of a shared run, and joins the rows of all parts if it is the last."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

from llava_cli import render
from llava_cli.batch.meter import Meter
from llava_cli.batch.ranges import open_run
from llava_cli.batch.ranges.answering import answer_ranges
from llava_cli.batch.ranges.merge import merge_run
from llava_cli.batch.ranges.row_range import RowRange, Shard
from llava_cli.batch.ranges.shared_run import SharedRun
from llava_cli.batch.run import (
    Job,
    StopSignal,
    engine_of,
    exit_code,
    loader_of,
    note_refusal,
    note_what_is_left_out,
    nothing_in,
    open_larger,
    run_settings,
    settle_precision,
    stopped,
    verify,
)
from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine
from llava_cli.errors import BadData, OutputLocked, UsageError


def run_shard(job: Job, shard: Shard) -> int:
    """Runs the job's part and returns the exit code. Raises as `run`, and as `SharedRun.begin`."""
    refuse_changes(job, "--shard")
    tally, stop = Tally(job.verify), StopSignal(job.quiet)
    with ExitStack() as stack:
        if job.templates:
            stack.callback(job.templates.close)
        stack.callback(job.source.close)
        larger = open_larger(job)
        job, run = begin_run(job, larger, shard)
        if run.is_merged:
            return join(run, job.quiet)
        speed = "nothing left to do"
        if missing := list(run.missing(run.grid.of_shard(shard))):
            speed = _answer(job, run, missing, larger, tally, stop, stack)
    if not job.quiet:
        render.note(f"shard {shard}: {tally.summary()} · {speed}")
    return stopped(job, stop) or _merge_if_last(job, run) or exit_code(job, tally)


def refuse_changes(job: Job, option: str) -> None:
    """Raises `UsageError` for options about rows that there are already, which are those of a single run."""
    for name, is_set in (("--extend", job.extend), ("--retry-errors", job.retry), ("--repair", job.repair)):
        if is_set:
            hint = f"leave {option} out once all rows are there; llava batch --merge FILE joins them"
            raise UsageError(name, f"does not go with {option}", hint)


def begin_run(job: Job, larger: Engine | None, shard: Shard | None) -> tuple[Job, SharedRun]:
    """Starts or joins the job's run -> the job with the precision of all its rows, and the run.

    Raises as `SharedRun.begin`, and `InputMissing` if there is nothing in the source.
    """
    assert job.output is not None
    run, is_listed = open_run(job.output), False
    saved = run.saved_precision()
    settled = settle_precision(job, saved)

    def tasks() -> Iterator[Task]:
        nonlocal is_listed
        is_listed = True
        tasks = job.source.tasks()
        return job.templates.checked(tasks) if job.templates else tasks

    try:
        with render.spinner("waiting for the list of all rows", job.quiet or job.source.is_stdin):
            run.begin(run_settings(settled, larger), tasks, shard)
    except BadData:
        if saved is not None or run.saved_precision() is None:
            raise
        return begin_run(job, larger, shard)  # a machine that may have chosen another precision has begun it meanwhile
    if run.grid.total == 0:
        raise nothing_in(job)
    if is_listed:
        note_what_is_left_out(job)
    elif job.source.must_be_listed:
        deque(job.source.tasks(), maxlen=0)
    return settled, run


def _answer(
    job: Job,
    run: SharedRun,
    ranges: Sequence[RowRange],
    larger: Engine | None,
    tally: Tally,
    stop: StopSignal,
    stack: ExitStack,
) -> str:
    """Answers ranges, and returns a line about the speed."""
    loader = loader_of(job)
    stack.callback(loader.close)
    engine = engine_of(job, larger)
    stack.enter_context(stop)
    meter, done, total = Meter(tally), 0, sum(map(len, ranges))

    def on_range(rows: RowRange) -> None:
        nonlocal done
        done += len(rows)

    def progress() -> render.Progress:
        found = meter.progress()
        return replace(found, rows=max(done, found.rows))  # some rows were answered by others

    with render.counting(total, progress, job.quiet, job.json_progress):
        answer_ranges(job, run, ranges, engine, loader, meter.add, on_range, stop.go_on)
    if job.verify and not stop.signal:
        verify(job, tally, engine, loader, stop)
    note_refusal(job, loader.last_refusal)
    return meter.speed(engine.where)


def _merge_if_last(job: Job, run: SharedRun) -> int:
    """Joins the rows if they are all there and nobody else does it; returns the exit code of that."""
    if next(run.missing(run.grid.all()), None) is not None:
        if not job.quiet:
            render.note("rows of other shards are missing: the last shard joins them all")
        return 0
    return join(run, job.quiet)


def join(run: SharedRun, quiet: bool) -> int:
    """As `merge_run`, unless another process joins the rows."""
    try:
        return merge_run(run, quiet)
    except OutputLocked:
        if not quiet:
            render.note(f"another process is joining the rows of {run.name}")
        return 0
