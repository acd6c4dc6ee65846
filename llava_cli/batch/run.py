"""`llava batch` from SOURCE to the last row: source -> tasks -> engine -> rows -> journal."""

from __future__ import annotations

import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from llava_cli import render, signals
from llava_cli._version import __version__
from llava_cli.batch.journal import Journal
from llava_cli.batch.judged_engine import JudgedEngine, Promise
from llava_cli.batch.meter import Meter
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.rows import to_line
from llava_cli.batch.run_settings import identify, with_one_precision
from llava_cli.batch.runner import Fill, answer_tasks, conversation_of, sampled, sampling_of, unfilled
from llava_cli.batch.sources.source import Source
from llava_cli.batch.tally import Tally
from llava_cli.batch.task_questions import TaskQuestions
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine
from llava_cli.errors import InputMissing, LlavaError
from llava_cli.loader import open_engine
from llava_cli.settings import Settings
from llava_cli.untrusted_text import printable


@dataclass(frozen=True)
class Job:
    """What the command line asks for; `command` is the command line itself, for hints."""

    source: Source
    settings: Settings
    command: str
    output: Path | str | None = None
    """The file of its rows, or the URL of an object in a bucket; None for stdout."""
    templates: TaskQuestions | None = None
    """Fills in the questions that are templates."""
    size: int | None = None
    extend: bool = False
    retry: bool = False
    repair: bool = False
    verify: int = 0
    promise: Promise | None = None
    escalate: Settings | None = None
    """Those of the larger model."""
    sight: int = 0
    """Of how many rows to tell the sight."""
    allow_truncated: bool = False
    allow_urls: bool = False
    json_progress: bool = False
    quiet: bool = False


def run(job: Job) -> int:
    """Runs the job and returns the exit code. Raises a `LlavaError` if it cannot begin, or cannot write."""
    tally, stop = Tally(job.verify), StopSignal(job.quiet)
    with ExitStack() as stack:
        if job.templates:
            stack.callback(job.templates.close)
        stack.callback(job.source.close)
        journal = tasks = None
        larger = open_larger(job)
        if job.output is None:
            if job.promise:
                job = settle_precision(job, None)
                run_settings(job, larger)  # holds the calibration against them
            tasks = job.source.checked_tasks()
            if job.templates and job.templates.columns and not job.source.is_stream:
                deque(job.templates.checked(job.source.tasks_with_rows()), maxlen=0)
        else:
            journal = Journal(Path(job.output))
            stack.callback(journal.close)
            try:
                job = _open_journal(job, journal, tally, larger)
            except LlavaError:
                journal.withdraw()
                raise
            if journal.done < journal.total or journal.to_redo or job.verify:
                tasks = journal.tasks()
        source_is_read = journal is not None or not job.source.is_stream
        if source_is_read:
            note_what_is_left_out(job)
        if tasks is None:
            return _finish(job, tally, stop, "nothing left to do")
        loader = loader_of(job)
        stack.callback(loader.close)
        engine = engine_of(job, larger)
        stack.enter_context(stop)
        speed = _answer(job, journal, tasks, tally, engine, loader, stop)
        if job.verify and not stop.signal:
            verify(job, tally, engine, loader, stop)
        note_refusal(job, loader.last_refusal)
        if not source_is_read:
            note_what_is_left_out(job)
    return _finish(job, tally, stop, speed)


def fill_of(job: Job) -> Fill:
    """What fills in the questions of tasks."""
    return partial(job.templates.fill, folder=job.source.folder) if job.templates else unfilled


def loader_of(job: Job, processes: int | None = None) -> PictureLoader:
    """What opens the job's pictures, in so many processes; None for as many as suit this machine."""
    return PictureLoader(
        job.source.find,
        job.allow_truncated,
        job.allow_urls,
        dpi=job.settings.pictures.dpi,
        readers=job.source.readers,
        holds=job.source.holds,
        keep_files=job.templates is not None,
        processes=processes,
    )


def engine_of(job: Job, larger: Engine | None) -> Engine:
    """The model that answers, ready. Raises as `open_engine`, and `UsageError` for options that it does not have."""
    with render.spinner("loading the model", job.quiet):
        engine = open_engine(job.settings, render.note, render.notes(job.quiet))
    sampling = job.settings.sampling
    engine.check_options(replace(sampling, sight=sampling.sight or job.sight > 0))
    if not job.quiet:
        render.note_demo_model(job.settings.load, engine.model)
    if job.promise or larger:
        engine = JudgedEngine(engine, job.promise, larger, job.settings.remote.concurrency)
    return engine


def note_what_is_left_out(job: Job) -> None:
    """Prints the notes of a source that has been read to its end."""
    for line in () if job.quiet else job.source.notes():
        render.note(line)


def note_refusal(job: Job, error: LlavaError | None) -> None:
    """Prints why the last picture that was not there could not be opened, and what helps."""
    if error and not job.quiet:
        render.note("; ".join(filter(None, (str(error), error.hint))))


def open_larger(job: Job) -> Engine | None:
    """The model that is asked about what the first one leaves open. Raises as `RemoteEngine`."""
    if job.escalate is None:
        return None
    try:
        return open_engine(job.escalate, render.note)
    except LlavaError as error:
        for word, ours in _ESCALATE_WORDS.items():
            error.hint = error.hint.replace(word, ours)
        raise


_ESCALATE_WORDS = {"--server": "--escalate", "-m NAME": "--escalate-model NAME", "LLAVA_API_KEY": "LLAVA_ESCALATE_KEY"}
"""What the options of a first server are called for the larger model."""


def settle_precision(job: Job, saved: str | None) -> Job:
    """The job with the one precision of all its rows. Raises and hints as `one_precision`."""
    return replace(job, settings=with_one_precision(job.settings, saved, render.notes(job.quiet)))


def _open_journal(job: Job, journal: Journal, tally: Tally, larger: Engine | None) -> Job:
    """Locks the output, checks that its rows are this job's, and counts them; returns the job with its precision."""
    journal.lock()
    saved = journal.saved_precision()
    job = settle_precision(job, saved)
    tasks = job.source.tasks()
    if job.templates and saved is None:  # a source that has lost a column since is no reason not to go on
        tasks = job.templates.checked(tasks)
    added, removed = journal.begin(run_settings(job, larger), tasks, job.extend)
    if not job.quiet and (added or removed):
        action = "are taken in" if job.extend else "are left out; --extend takes them in"
        changes = [f"{added} rows were added to the source since and {action}"] if added else []
        changes += [f"{removed} rows are about what is no longer in it"] if removed else []
        render.note("; ".join(changes))
    journal.check(tally.add, job.retry, job.repair)
    return job


def run_settings(job: Job, larger: Engine | None) -> dict[str, Any]:
    """What all rows of a run have in common; with other settings the run cannot be resumed.

    Raises `BadData` if the calibration was made with others.
    """
    settings, source = job.settings, job.source
    sight = {"sight": job.sight} if job.sight else {}
    found = {
        "llava": ".".join(__version__.split(".")[:2]),
        **identify(settings),
        "system": settings.system,
        **settings.sampling.said(),
        **settings.pictures.said(),
        **sight,
        "fit": settings.load.fit,
        "visual_tokens": settings.load.visual_tokens,
        "allow_truncated": job.allow_truncated,
        "questions": source.questions,
        **(job.templates.said() if job.templates else {}),
        "root": source.origin,
    }
    if job.promise:
        calibration = job.promise.calibration
        calibration.check(found)
        found["calibration"] = {"temperature": calibration.temperature, "threshold": job.promise.threshold}
    if larger:
        found["escalate"] = f"{larger.model} at {larger.where}"
    return found


def _answer(
    job: Job,
    journal: Journal | None,
    tasks: Iterable[Task],
    tally: Tally,
    engine: Engine,
    loader: PictureLoader,
    stop: StopSignal,
) -> str:
    """Answers the tasks whose rows are to be replaced, then `tasks`, and returns a line about the speed."""
    meter, fill = Meter(tally), fill_of(job)

    def rows(tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
        for task, row in answer_tasks(engine, tasks, loader, job.settings, job.size, stop.go_on, fill):
            meter.add(task, row)
            yield row

    def of_sample(tasks: Iterable[Task], numbers: Iterable[int]) -> Iterable[Task]:
        total = journal.total if journal else None
        return sampled(zip(numbers, tasks, strict=False), job.sight, total) if job.sight else tasks

    with render.counting(journal.total if journal else None, meter.progress, job.quiet, job.json_progress):
        if journal is None:
            ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
            for row in rows(of_sample(tasks, count())):
                sys.stdout.write(to_line(row, ascii_only).decode())
                sys.stdout.flush()
        else:
            if journal.to_redo:
                journal.replace(rows(of_sample(journal.tasks_to_redo(), journal.to_redo)))
            for row in rows(of_sample(tasks, count(journal.done))) if stop.go_on() else ():
                journal.append(row)
    return meter.speed(engine.where)


def verify(job: Job, tally: Tally, engine: Engine, loader: PictureLoader, stop: StopSignal) -> None:
    """Asks a sample of the rows again, one at a time, and prints which answers differ."""
    differences, asked = [], 0
    with render.spinner("verifying", job.quiet):
        for task, text in tally.sample:
            picture = loader.load(task, engine.picture_resize) if stop.go_on() else None
            if picture is None or isinstance(picture, LlavaError):
                continue
            asked += 1
            sampling = sampling_of(task, job.settings.sampling)
            alone = engine.answer(conversation_of(task, picture, job.settings), sampling).text
            if alone != text:
                differences.append(f"  {printable(task.image)}: {text!r}, alone {alone!r}")
    render.note(f"verified {asked} rows, asked alone: {len(differences)} differ ({engine.precision or engine.where})")
    for line in differences:
        render.note(line)


def _finish(job: Job, tally: Tally, stop: StopSignal, speed: str) -> int:
    """Prints the summary, and the command that resumes a run that was stopped; returns the exit code.

    Raises `InputMissing` if the source has no tasks.
    """
    if not tally.rows and not stop.signal and not job.source.is_stdin:
        raise nothing_in(job)
    if not job.quiet:
        render.note(f"{tally.summary()} · {speed}")
    return stopped(job, stop) or exit_code(job, tally)


def nothing_in(job: Job) -> InputMissing:
    """The error for a source without tasks."""
    return InputMissing(job.source.name, *job.source.empty_reason())


def stopped(job: Job, stop: StopSignal) -> int:
    """The exit code after a signal, after printing the command that goes on; 0 if there was none."""
    if stop.signal and job.output is not None:
        render.note(f"stopped; to go on:\n  {job.command}")
    return 128 + stop.signal if stop.signal else 0


def exit_code(job: Job, tally: Tally) -> int:
    """1 where something has failed."""
    return 1 if tally.failed or tally.escalation_errors or job.source.skipped.unreadable.count else 0


class StopSignal:
    """The first SIGINT or SIGTERM lets the answers that were begun finish; the second one ends everything at once."""

    def __init__(self, quiet: bool) -> None:
        self.signal = 0
        self._quiet = quiet
        self._old_handlers: dict[int, Any] = {}

    def go_on(self) -> bool:
        return not self.signal

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if not signals.is_ignored(number):
                self._old_handlers[number] = signal.signal(number, self._stop)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self._quiet:
            render.note("finishing the answers that were begun; once more stops at once")
        self.__exit__()
