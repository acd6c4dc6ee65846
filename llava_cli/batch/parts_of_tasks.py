"""Tasks about files -> tasks about pictures: one for each page or frame that a file has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from llava_cli import limits
from llava_cli.batch.foreign_files import head_of
from llava_cli.batch.tasks import Task
from llava_cli.errors import LlavaError, SourceLost
from llava_cli.images import formats
from llava_cli.images.reader import sandbox_pool
from llava_cli.parts import WHOLE, Chosen, Content, Part, choose, split_reference
from llava_cli.settings import PictureOptions

Find = Callable[[str], "bytes | Path"]
"""The file of a task's picture. Raises a `LlavaError`."""


def with_parts(tasks: Iterable[Task], find: Find, options: PictureOptions) -> Iterator[Task]:
    """Each task, for each picture of its file; in the order of the tasks, then of the pages or frames.

    A file that cannot be opened keeps its one task, whose row will say why. Raises `SourceLost`.
    """
    chosen: tuple[str, list[Part]] = "", []
    for task in tasks:
        task = replace(task, region=task.region or options.region)
        image, part = split_reference(task.image)
        if part != WHOLE and image.lower().endswith(formats.SUFFIXES_OF_SEVERAL):
            task = replace(task, image=image, page=part.page, time=part.time)
        if task.part != WHOLE or not _may_have_several(task.image, find, options):
            yield task
            continue
        if chosen[0] != task.image:
            chosen = task.image, _chosen(task.image, find, options).parts
        for one in chosen[1]:
            yield replace(task, page=one.page, time=one.time)


def _may_have_several(image: str, find: Find, options: PictureOptions) -> bool:
    """Whether a file may have several pictures of which more than the first is wanted; by its name, if that says it."""
    name = image.lower()
    if name.endswith((*formats.DOCUMENT_SUFFIXES, *formats.FILM_SUFFIXES)):
        return True
    if name.endswith(formats.ANIMATION_SUFFIXES):
        return bool(options.pages or options.frames or options.every)
    if name.endswith(formats.SINGLE_SUFFIXES):
        return False
    try:
        file = find(image)
    except SourceLost:
        raise
    except LlavaError:
        return False
    head = file[: formats.MAGIC_BYTES] if isinstance(file, bytes) else head_of(str(file))
    return formats.has_several(head)


def _chosen(image: str, find: Find, options: PictureOptions) -> Chosen:
    try:
        content = sandbox_pool().inspect(image, find(image))
    except SourceLost:
        raise
    except LlavaError:
        return Chosen([WHOLE])
    if not isinstance(content, Content):
        return Chosen([WHOLE])
    return choose(content, options.pages, options.frames, options.every, limits.PAGES)
