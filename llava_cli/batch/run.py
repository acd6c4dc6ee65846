"""One run from SOURCE to its last row: what to do, who does it, what is said about it."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llava_cli import __version__, render, signals
from llava_cli.batch.journal import Journal
from llava_cli.batch.opener import Opener
from llava_cli.batch.rows import to_line
from llava_cli.batch.runner import answered, conversation_of, sampling_of
from llava_cli.batch.source import Source
from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine
from llava_cli.errors import InputMissing, LlavaError
from llava_cli.loader import identify, open_engine
from llava_cli.settings import Settings
from llava_cli.untrusted_text import printable


@dataclass(frozen=True)
class Job:
    """What the command line asks for; `command` is itself, to be typed again."""

    source: Source
    settings: Settings
    command: str
    output: Path | None = None
    size: int | None = None
    extend: bool = False
    retry: bool = False
    repair: bool = False
    verify: int = 0
    allow_truncated: bool = False
    allow_urls: bool = False
    quiet: bool = False


def run(job: Job) -> int:
    """Does it all; the exit code. Raises what keeps it from beginning, or from writing."""
    tally, stopping = Tally(job.verify), Stopping(job.quiet)
    with ExitStack() as stack:
        journal = tasks = None
        if job.output is None:
            tasks = job.source.ready()
        else:
            journal = Journal(job.output)
            stack.callback(journal.close)
            _begin(job, journal, tally)
            if journal.done < journal.total or journal.again or job.verify:
                tasks = journal.tasks()
        is_counted = journal is not None or not job.source.is_stream
        if is_counted:
            _say_what_is_left_out(job)
        if tasks is None:
            return _end(job, tally, stopping, "nothing left to do")
        opener = Opener(job.source.locate, job.allow_truncated, job.allow_urls)
        stack.callback(opener.close)
        with render.spinner("loading the model", job.quiet):
            engine = open_engine(job.settings, render.note)
        if not job.quiet:
            render.say_demo(job.settings, engine)
        stack.enter_context(stopping)
        speed = _answer(job, journal, tasks, tally, engine, opener, stopping)
        if job.verify and not stopping.signal:
            _verify(job, tally, engine, opener, stopping)
        if opener.refused and not job.quiet:
            render.note(f"{opener.refused}; {opener.refused.hint}")
        if not is_counted:
            _say_what_is_left_out(job)
    return _end(job, tally, stopping, speed)


def _say_what_is_left_out(job: Job) -> None:
    """Once its source has been looked through: of a stream, at the end."""
    for line in () if job.quiet else job.source.notes():
        render.note(line)


def _begin(job: Job, journal: Journal, tally: Tally) -> None:
    """Takes the output, sees that this job is the one that it has rows of, and counts them."""
    journal.lock()
    added, gone = journal.begin(_made_by(job), job.source.tasks(), job.extend)
    if not job.quiet and (added or gone):
        what = "are taken in" if job.extend else "are left out; --extend takes them in"
        news = [f"{added} rows were added to the source since and {what}"] if added else []
        render.note("; ".join(news + ([f"{gone} rows are about what is no longer in it"] if gone else [])))
    journal.check(tally.see, job.retry, job.repair)


def _made_by(job: Job) -> dict[str, Any]:
    """What all rows of a run have in common; other rows are another run's."""
    settings, source = job.settings, job.source
    names = ("system", "max_tokens", "temperature", "top_p", "seed", "stop", "fit", "visual_tokens")
    return {
        "llava": ".".join(__version__.split(".")[:2]),
        **identify(settings),
        **{name: getattr(settings, name) for name in names},
        "allow_truncated": job.allow_truncated,
        "questions": source.questions,
        "root": str(Path(source.folder).resolve()),
    }


def _answer(
    job: Job,
    journal: Journal | None,
    tasks: Iterable[Task],
    tally: Tally,
    engine: Engine,
    opener: Opener,
    stopping: Stopping,
) -> str:
    """Answers `tasks`, and before them those whose rows are replaced; says how fast that went."""
    begin, pictures, before, tokens = time.monotonic(), 0, "", tally.tokens

    def rows(tasks: Iterable[Task]) -> Iterator[dict[str, Any]]:
        nonlocal pictures, before
        for task, row in answered(engine, tasks, opener, job.settings, job.size, stopping.go_on):
            tally.see(task, row)
            pictures += task.image != before
            before = task.image
            show(tally.rows, tally.failed, pictures, tally.tokens - tokens)
            yield row

    with render.counting(journal.total if journal else None, job.quiet) as show:
        if journal is None:
            ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
            for row in rows(tasks):
                sys.stdout.write(to_line(row, ascii_only).decode())
                sys.stdout.flush()
        else:
            if journal.again:
                journal.replace(rows(journal.tasks_again()))
            for row in rows(tasks) if stopping.go_on() else ():
                journal.append(row)
    if not before:
        return "nothing left to do"
    seconds = time.monotonic() - begin
    rates = f"{pictures / seconds:.1f} pictures/s · {(tally.tokens - tokens) / seconds:.1f} tokens/s"
    return f"{rates} · {seconds:.1f} s" + (f" · {engine.where}" if engine.where else "")


def _verify(job: Job, tally: Tally, engine: Engine, opener: Opener, stopping: Stopping) -> None:
    """Asks some rows again, one by one, and says which answers differ."""
    flips, asked = [], 0
    with render.spinner("verifying", job.quiet):
        for task, text in tally.drawn:
            picture = opener.open(task.image) if stopping.go_on() else None
            if picture is None or isinstance(picture, LlavaError):
                continue
            asked += 1
            alone = engine.answer(conversation_of(task, picture, job.settings), sampling_of(task, job.settings)).text
            if alone != text:
                flips.append(f"  {printable(task.image)}: {text!r}, alone {alone!r}")
    render.note(f"verified {asked} rows, asked alone: {len(flips)} differ ({engine.precision or engine.where})")
    for line in flips:
        render.note(line)


def _end(job: Job, tally: Tally, stopping: Stopping, speed: str) -> int:
    """The summary, and how to go on where there is more to do."""
    if not tally.rows and not stopping.signal and not job.source.is_stdin:
        reason, hint = job.source.why_nothing()
        raise InputMissing(job.source.name, reason, hint)
    if not job.quiet:
        render.note(f"{tally.summary()} · {speed}")
    if stopping.signal:
        if job.output is not None:
            render.note(f"stopped; to go on:\n  {job.command}")
        return 128 + stopping.signal
    return 1 if tally.failed or job.source.passed.unreadable.count else 0


class Stopping:
    """The first SIGINT or SIGTERM lets the answers in hand finish; the second one ends everything at once."""

    def __init__(self, quiet: bool) -> None:
        self.signal = 0
        self._quiet = quiet
        self._before: dict[int, Any] = {}

    def go_on(self) -> bool:
        return not self.signal

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            if not signals.is_ignored(number):
                self._before[number] = signal.signal(number, self._stop)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if not self._quiet:
            render.note("finishing what is in hand; once more stops at once")
        self.__exit__()
