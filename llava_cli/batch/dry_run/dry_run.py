"""`llava batch --dry-run`: what a run would do, and what it would take. It writes nothing.

The source is read to its end and every picture is opened, as the run would; a sample of the rows is answered.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_cli import render
from llava_cli.batch.dry_run.dry_run_words import lines_of_estimate, lines_of_source
from llava_cli.batch.dry_run.estimate import Measured, Tokens, measure, sample_of
from llava_cli.batch.dry_run.survey import Survey, names_of_sizes, new_survey
from llava_cli.batch.journal import Journal
from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.run import (
    Job,
    engine_of,
    fill_of,
    loader_of,
    note_refusal,
    note_what_is_left_out,
    open_larger,
    run_settings,
    settle_precision,
)
from llava_cli.batch.runner import sampled
from llava_cli.batch.tally import Tally
from llava_cli.batch.tasks import Task
from llava_cli.engine import Engine
from llava_cli.errors import InputMissing
from llava_cli.hardware import memory
from llava_cli.untrusted_text import printable


@dataclass(frozen=True)
class Estimate:
    """What a run takes: times in seconds, memory in bytes."""

    model: str
    where: str
    rows: int
    """Those whose pictures can be opened."""
    measured: Measured
    load_seconds: float
    has_new_copy: bool
    """Whether the model was loaded as it will not be again: the run loads it faster, and nobody knows how fast."""
    process_bytes: int
    """The most that a process which does this holds."""
    children_bytes: int
    """The most that the processes hold which it starts, for pictures."""
    device_bytes: int | None
    """The most that is held on a GPU; None without one."""
    list_seconds: float = 0.0
    open_seconds: float = 0.0
    """For all pictures, without a model beside."""

    @property
    def answer_seconds(self) -> float:
        """Pictures are opened while others are answered: what takes longer decides."""
        return max(self.measured.first_seconds + self.rows * self.measured.seconds_per_row, self.open_seconds)

    @property
    def seconds(self) -> float:
        return self.list_seconds + self.load_seconds + self.answer_seconds


def dry_run(job: Job, as_json: bool = False) -> int:
    """Prints what `run` would do; returns 1 if there are rows that would be errors, else 0.

    Raises what `run` raises before its first row, except where another run has the output.
    """
    with ExitStack() as stack:
        if job.templates:
            stack.callback(job.templates.close)
        stack.callback(job.source.close)
        survey = stack.enter_context(new_survey())
        journal, tally = Journal(Path(job.output)) if job.output else None, Tally()
        larger = open_larger(job)
        begin = time.monotonic()
        job = _list(job, survey, journal, tally, larger)
        listing_seconds = time.monotonic() - begin
        note_what_is_left_out(job)
        if not survey.rows and not tally.rows and not job.source.is_stdin:
            reason, hint = job.source.empty_reason()
            raise InputMissing(job.source.name, reason, hint)
        loader = loader_of(job)
        stack.callback(loader.close)
        opening_seconds = _open(job, survey, loader)
        facts = _facts(job, survey, journal, tally)
        if not as_json:  # before a model is loaded, which may take long
            _say(lines_of_source(facts))
        if survey.answerable:
            estimate = _estimate(job, survey, loader, engine_of(job, larger), journal.total if journal else None)
            estimate = replace(estimate, list_seconds=listing_seconds, open_seconds=opening_seconds)
            facts |= _facts_of(estimate, survey)
            if not as_json:
                _say(lines_of_estimate(facts))
        if as_json:
            render.show_json(facts)
        if job.verify:
            render.notes(job.quiet)("llava: what --verify asks again is not in the estimate")
    return 1 if facts["unreadable"] or job.source.skipped.unreadable.count else 0


def _say(lines: Iterable[str]) -> None:
    for line in lines:
        render.say(line)


def _list(job: Job, survey: Survey, journal: Journal | None, tally: Tally, larger: Engine | None) -> Job:
    """Reads the source to its end; returns the job with the precision of its rows."""
    tasks: Iterable[tuple[int, Task]]
    if journal:
        journal.refuse_unwritable()
    saved = journal.saved_precision() if journal else None
    of_source = job.source.tasks()
    if job.templates and saved is None and not (journal is None and job.source.is_stream):  # as the run does
        of_source = job.templates.checked(of_source)
    if journal:
        job = settle_precision(job, saved)
        settings = run_settings(job, larger)
        tasks = journal.look(settings, of_source, tally.add, job.extend, job.retry, job.repair)
    else:
        if job.promise:
            job = settle_precision(job, None)
            run_settings(job, larger)  # holds the calibration against them
        tasks = enumerate(of_source)
    with render.counted("reading the source", None, job.quiet) as show:
        for done, (number, task) in enumerate(tasks, 1):
            survey.add(number, task)
            show(done)
    return job


def _open(job: Job, survey: Survey, loader: PictureLoader) -> float:
    """Opens all pictures, and returns how many seconds it took."""
    begin = time.monotonic()
    with render.counted("opening pictures", survey.pictures, job.quiet) as show:
        for number, (task, picture) in enumerate(loader.load_all(survey.to_open())):
            survey.opened(number, task, picture)
            show(number + 1)
    note_refusal(job, loader.last_refusal)
    return time.monotonic() - begin


def _estimate(job: Job, survey: Survey, loader: PictureLoader, engine: Engine, total: int | None) -> Estimate:
    """What a run takes with this engine; `total` are the rows of the whole output, where that is known."""

    def mark(number: int, task: Task) -> Task:
        return next(sampled([(number, task)], job.sight, total)) if job.sight else task

    of_loading = memory.peak_memory()
    if engine.has_new_copy:  # whose making took memory that the run does not need
        memory.forget_peak()
        of_loading = 0
    sample = sample_of(survey, engine.most_at_a_time(job.size), mark)
    with render.counted("answering a sample", None, job.quiet) as show:
        measured = measure(engine, loader, sample, job.settings, job.size, show, fill_of(job))
    return Estimate(
        model=" ".join(filter(None, (engine.model, engine.precision))),
        where=engine.where or engine.device,
        rows=survey.answerable,
        measured=measured,
        load_seconds=0.0 if engine.has_new_copy else engine.load_seconds,
        has_new_copy=engine.has_new_copy,
        process_bytes=max(of_loading, memory.peak_memory()),
        children_bytes=memory.peak_memory_of_children(),
        device_bytes=engine.peak_memory() if engine.device not in ("", "cpu") else None,
    )


def _facts(job: Job, survey: Survey, journal: Journal | None, tally: Tally) -> dict[str, Any]:
    """What the source has and the output lacks, as --json prints it."""
    doubles, rows_of_doubles = survey.doubles()
    facts: dict[str, Any] = {
        "source": job.source.name,
        "pictures": survey.pictures,
        "rows": survey.rows,
        "answerable": survey.answerable,
        "unreadable": [
            {
                "type": refusal.kind,
                "reason": printable(refusal.reason),
                "pictures": refusal.pictures,
                "rows": refusal.rows,
                "images": [_name(task) for task in survey.refused(refusal)],
            }
            for refusal in survey.refusals()
        ],
        "doubles": {
            "pictures": doubles,
            "rows": rows_of_doubles,
            "groups": [[_name(task) for task in group] for group in survey.groups_of_doubles()],
        },
        "output": None,
    }
    if journal:
        written = {"path": printable(str(job.output)), "rows": journal.done, "errors": tally.failed}
        again = {"to_ask_again": len(journal.to_redo), "added": journal.added, "removed": journal.removed}
        facts["output"] = {**written, **again, "extend": job.extend}
    return facts


def _name(task: Task) -> str:
    return printable(f"{task.image}{task.part}") + (f" [{task.region}]" if task.region else "")


def _facts_of(estimate: Estimate, survey: Survey) -> dict[str, Any]:
    """What a run takes, as --json prints it."""
    measured, sizes = estimate.measured, survey.sizes()
    prompts = measured.tokens(lambda answer: answer.prompt_tokens, sizes)
    answers = measured.tokens(lambda answer: answer.answer_tokens, sizes)
    cut_off = sum(answer.finish_reason == "length" for _, answer in measured.answers)
    by_size = zip(names_of_sizes(), sizes, _means(prompts, sizes), _means(answers, sizes), strict=True)
    return {
        "model": estimate.model,
        "where": estimate.where,
        "sizes": [
            {"size": name, "pictures": pictures, "rows": rows, "prompt_tokens": prompt, "answer_tokens": answer}
            for name, (pictures, rows), prompt, answer in by_size
            if pictures
        ],
        "prompt_tokens": _tokens_object(prompts),
        "answer_tokens": _tokens_object(answers),
        "cut_off": round(cut_off / len(measured.answers), 4) if measured.answers else None,
        "rows_per_second": round(1 / measured.seconds_per_row, 3) if measured.seconds_per_row else None,
        "seconds": {
            "list": round(estimate.list_seconds, 3),
            "load": round(estimate.load_seconds, 3),
            "answer": round(estimate.answer_seconds, 3),
            "total": round(estimate.seconds, 3),
        },
        "new_copy": estimate.has_new_copy,
        "bytes": {
            "process": estimate.process_bytes,
            "picture_processes": estimate.children_bytes,
            "gpu": estimate.device_bytes,
        },
        "sample": {
            "rows": measured.rows,
            "seconds": round(measured.seconds, 3),
            "errors": [
                {"type": kind, "reason": printable(reason), "rows": count}
                for (kind, reason), count in measured.errors.most_common()
            ],
        },
    }


def _means(tokens: Tokens | None, sizes: Sequence[tuple[int, int]]) -> list[float | None]:
    return [mean and round(mean, 1) for mean in tokens.by_size] if tokens else [None] * len(sizes)


def _tokens_object(tokens: Tokens | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {"least": tokens.least, "most": tokens.most, "mean": round(tokens.mean, 1), "total": tokens.total}
