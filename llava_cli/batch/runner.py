"""Tasks -> rows, in their order: pictures are opened ahead, the engine answers many at once, rows wait their turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

from llava_cli.batch.opener import Opener
from llava_cli.batch.rows import Seen, make_row
from llava_cli.batch.tasks import Task
from llava_cli.conversation import Conversation, Picture
from llava_cli.engine import Answer, Engine, Request
from llava_cli.errors import LlavaError
from llava_cli.hardware.memory import TIDY, give_back_memory
from llava_cli.settings import Sampling, Settings

WINDOW = 1024
"""Tasks that may be begun and not yet written: a slow first one does not let the others pile up."""


def sampling_of(task: Task, settings: Sampling) -> Sampling:
    if not task.max_tokens:
        return settings
    return replace(settings, max_tokens=task.max_tokens, unset=settings.unset - {"max_tokens"})


def conversation_of(task: Task, picture: Picture, settings: Settings) -> Conversation:
    system = task.system if task.system is not None else settings.system
    return Conversation(system=system).ask(task.question, [picture])


def answered(
    engine: Engine,
    tasks: Iterable[Task],
    opener: Opener,
    settings: Settings,
    size: int | None,
    go_on: Callable[[], bool],
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Each task with its row, in order. Once `go_on()` is false, those that are being answered are the last."""
    gate = threading.Semaphore(WINDOW)
    begun: dict[int, tuple[Task, Seen | None]] = {}

    def admitted() -> Iterator[Task]:
        for task in tasks:
            gate.acquire()
            yield task

    def requests() -> Iterator[Request | LlavaError]:
        for number, (task, picture) in enumerate(opener.opened(admitted())):
            if isinstance(picture, LlavaError):
                begun[number] = task, None
                yield picture
            else:
                begun[number] = task, Seen.of(picture)
                yield Request(conversation_of(task, picture, settings), sampling_of(task, settings))

    ready: dict[int, Answer | LlavaError] = {}
    first = 0
    with closing(engine.answer_many(requests(), size, go_on)) as outcomes:  # type: ignore[type-var]
        for number, outcome in outcomes:
            ready[number] = outcome
            while first in ready:
                task, seen = begun.pop(first)
                yield task, make_row(task, seen, ready.pop(first), engine.model)
                gate.release()
                first += 1
                if first % TIDY == 0:
                    give_back_memory()
