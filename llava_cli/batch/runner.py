"""Tasks -> rows, in order: pictures are loaded ahead, the engine answers several requests at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from llava_cli.batch.picture_loader import PictureLoader
from llava_cli.batch.rows import PictureFacts, make_row
from llava_cli.batch.tasks import FORMS, Task
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine import Answer, Engine, Request
from llava_cli.engine.generate.form_sandbox import FormSandbox
from llava_cli.errors import LlavaError
from llava_cli.hardware.allocator import TRIM_EVERY, trim_heap
from llava_cli.settings import OPTIONS, Sampling, Settings

MAX_PENDING = 1024
"""Tasks that may be begun and not yet yielded: otherwise all others would pile up in memory behind a slow one."""


def sampling_of(task: Task, sampling: Sampling) -> Sampling:
    """The run's options, with those of a row in their place; a row's form replaces whatever form the run's has.

    Raises `UsageError` for options that exclude each other.
    """
    own: dict[str, Any] = {name: value for name in FORMS if (value := getattr(task, name)) is not None}
    if own:
        of_choices = () if "choices" in own else ("otherwise", "at_least")
        own = {name: OPTIONS[name].default for name in (*FORMS, *of_choices)} | own
    if task.max_tokens:
        own["max_tokens"] = task.max_tokens
    if task.sight:
        own["sight"] = True
    return replace(sampling, **own, unset=sampling.unset - own.keys()) if own else sampling


def check_form(task: Task, sampling: Sampling, sandbox: FormSandbox | None) -> None:
    """Raises `UsageError` for a row's form that excludes an option of the run's or that no answer can have here.

    It may be a stranger's, so it is compiled in the sandbox first; without one, a server says what it can do.
    """
    if any(getattr(task, name) is not None for name in FORMS):
        options = sampling_of(task, sampling)
        if sandbox and (option := options.grammar_option):
            sandbox.check(option, getattr(options, option.key))


def sampled(tasks: Iterable[tuple[int, Task]], count: int, total: int | None) -> Iterator[Task]:
    """Tasks by the numbers of their rows -> tasks, of which `count` are to have their sight told.

    They are spread evenly over `total` rows or, where nobody knows how many there will be, are the first ones. Which
    they are follows from their numbers, so that a run that is resumed goes on with the same ones.
    """
    for number, task in tasks:
        is_in_sample = number < count if total is None else number * count % max(total, 1) < count
        yield replace(task, sight=True) if is_in_sample else task


def conversation_of(task: Task, picture: Picture, settings: Settings) -> Conversation:
    system = task.system if task.system is not None else settings.system
    return Conversation(system=system).ask(task.wording, [picture])


Fill = Callable[[Task, Picture], Task]


def unfilled(task: Task, picture: Picture) -> Task:
    """A task whose question is asked as it is."""
    return task


def answer_tasks(
    engine: Engine,
    tasks: Iterable[Task],
    loader: PictureLoader,
    settings: Settings,
    size: int | None,
    go_on: Callable[[], bool],
    fill: Fill = unfilled,
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Each task with its row, in order; up to `size` at a time, see `Engine.answer_many`.

    `fill` fills in the fields of its question, or raises a `LlavaError`, which its row has then.
    Once `go_on()` is false, only the answers that were begun are finished.
    """
    free_slots = threading.Semaphore(MAX_PENDING)
    pending: dict[int, tuple[Task, PictureFacts | None]] = {}

    def admitted_tasks() -> Iterator[Task]:
        for task in tasks:
            free_slots.acquire()
            yield task

    def requests() -> Iterator[Request | LlavaError]:
        for number, (task, picture) in enumerate(loader.load_all(admitted_tasks(), engine.picture_resize)):
            if isinstance(picture, LlavaError):
                pending[number] = task, None
                yield picture
                continue
            facts = PictureFacts.of(picture)
            try:
                task = fill(task, picture)
            except LlavaError as error:
                pending[number] = task, facts
                yield error
                continue
            pending[number] = task, facts
            picture = replace(picture, file=None)
            yield Request(conversation_of(task, picture, settings), sampling_of(task, settings.sampling))

    finished: dict[int, Answer | LlavaError] = {}
    next_number = 0
    with closing(engine.answer_many(requests(), size, go_on)) as outcomes:  # type: ignore[type-var]
        for number, outcome in outcomes:
            finished[number] = outcome
            while next_number in finished:
                task, facts = pending.pop(next_number)
                yield task, make_row(task, facts, finished.pop(next_number), engine.model)
                free_slots.release()
                next_number += 1
                if next_number % TRIM_EVERY == 0:
                    trim_heap()
