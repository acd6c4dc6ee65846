"""Tasks about files -> tasks about pictures: one for each page or frame that a file has."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava_cli import limits
from llava_cli.batch.sources.foreign_files import head_of
from llava_cli.batch.tasks import Task
from llava_cli.errors import LlavaError, SourceLost
from llava_cli.images import formats
from llava_cli.images.reader import is_url, sandbox_pool
from llava_cli.parts import WHOLE, Content, Part, choose, split_reference
from llava_cli.settings import PictureOptions
from llava_cli.untrusted_text import printable

Find = Callable[[str], "bytes | Path"]
"""The file of a task's picture. Raises a `LlavaError`."""
_TOGETHER = 1_000
"""Tasks about one file of which each page is asked before the next page is drawn."""


@dataclass
class LeftOut:
    """Files with more pages or frames than are asked about."""

    files: dict[str, None] = field(default_factory=dict)

    def note(self) -> str:
        """One line; empty if there are none."""
        if not self.files:
            return ""
        name = printable(next(iter(self.files)))
        others = f" and {len(self.files) - 1:,} others" if len(self.files) > 1 else ""
        most = limits.PAGES
        return f"{name}{others}: only {most:,} of its pages are asked about; --pages {most + 1}- asks about the rest"


def file_of(word: str) -> str:
    """The path that a SOURCE names: `doc.pdf` for `doc.pdf#2`, unless there is a file that is called so."""
    path, part = split_reference(word)
    return path if part != WHOLE and not os.path.lexists(word) and os.path.lexists(path) else word


def with_parts(tasks: Iterable[Task], find: Find, options: PictureOptions, left_out: LeftOut) -> Iterator[Task]:
    """Each task, for each picture of its file: of consecutive tasks about one file all about its first page, and so on.

    A file that cannot be opened keeps its tasks, whose rows will say why; so does one without any page of `options`.
    Raises `SourceLost`.
    """
    together: list[Task] = []
    find = _kept(find)
    for task in tasks:
        task = replace(_at_its_part(task, find), region=task.region or options.region)
        is_whole = task.part == WHOLE
        if together and not (is_whole and task.image == together[0].image and len(together) < _TOGETHER):
            yield from _spread(together, find, options, left_out)  # before the next file is looked for
            together = []
        if is_whole and (together or _may_have_several(task.image, find, options)):
            together.append(task)
        else:
            yield task
    if together:
        yield from _spread(together, find, options, left_out)


def _kept(find: Find) -> Find:
    """As `find`, which is not asked twice in succession for the same file: that may take long."""
    kept: dict[str, bytes | Path] = {}

    def find_or_keep(image: str) -> bytes | Path:
        if image not in kept:
            kept.clear()
            kept[image] = find(image)
        return kept[image]

    return find_or_keep


def _spread(tasks: list[Task], find: Find, options: PictureOptions, left_out: LeftOut) -> Iterator[Task]:
    """Tasks about one file, for each of its pictures that `options` choose."""
    for part in _parts(tasks[0].image, find, options, left_out):
        for task in tasks:
            yield replace(task, page=part.page, time=part.time)


def _at_its_part(task: Task, find: Find) -> Task:
    """The task with the page or the time that is written behind its file's name."""
    image, part = split_reference(task.image)
    if task.part != WHOLE or part == WHOLE:
        return task
    is_fragment = is_url(image) or image[:6].lower() == "file:/"  # no part of a name, where it is not escaped
    if not is_fragment and (_is_there(task.image, find) or not _is_there(image, find)):
        return task
    return replace(task, image=image, page=part.page, time=part.time)


def _is_there(image: str, find: Find) -> bool:
    file = _found(image, find)
    return file.exists() if isinstance(file, Path) else file is not None


def _found(image: str, find: Find) -> bytes | Path | None:
    """The file of a picture; None if its row will say why there is none. Raises `SourceLost`."""
    try:
        return find(image)
    except SourceLost:
        raise
    except LlavaError:
        return None


def _may_have_several(image: str, find: Find, options: PictureOptions) -> bool:
    """Whether a file may have several pictures, and others than the first are wanted; by its name, if that says it."""
    name = image.lower()
    wants_frames = bool(options.pages or options.frames or options.every)
    if name.endswith(formats.SINGLE_SUFFIXES):
        return False
    if name.endswith((*formats.DOCUMENT_SUFFIXES, *formats.FILM_SUFFIXES)):
        return True
    if name.endswith(formats.ANIMATION_SUFFIXES):
        return wants_frames
    if is_url(image):  # which is not fetched only to see what it is
        return False
    file = _found(image, find)
    head = head_of(str(file)) if isinstance(file, Path) else file or b""
    return formats.has_several(head) or (wants_frames and formats.begins_like_a_picture(head))


def _parts(image: str, find: Find, options: PictureOptions, left_out: LeftOut) -> list[Part]:
    """The pictures of a file that are asked about; at least one, so that there is a row that says what is wrong."""
    file = _found(image, find)
    content = None if file is None else sandbox_pool().inspect(image, file)
    if not isinstance(content, Content):
        return [WHOLE]
    chosen = choose(content, options.pages, options.frames, options.every, limits.PAGES)
    if chosen.left_out:
        left_out.files[image] = None
    return chosen.parts or [_first_page(options.pages or "1")]


def _first_page(pages: str) -> Part:
    """The first page that a text of `parse_pages` names."""
    return Part(page=int(re.split("[-,]", pages)[0]))
