"""SOURCEs -> tasks: folders, pictures, archives, tables, lists and files of questions; always in the same order."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from llava_cli.batch.roots import resolve
from llava_cli.batch.sources import foreign_files
from llava_cli.batch.sources.containers import open_container
from llava_cli.batch.sources.folders import SkippedFiles
from llava_cli.batch.sources.listing import STDIN, Layout, Listing
from llava_cli.batch.sources.parts_of_tasks import LeftOut, file_of, with_parts
from llava_cli.batch.sources.questions import Check, Questions
from llava_cli.batch.sources.source_kinds import (
    CloudSource,
    ContainerSource,
    FolderSource,
    ListSource,
    OneSource,
    PictureSource,
    QuestionsSource,
    refuse_cloud_url,
)
from llava_cli.batch.tasks import Task
from llava_cli.errors import InputMissing
from llava_cli.images.reader import is_url, local_path, read
from llava_cli.images.remote_names import is_cloud_url, shown
from llava_cli.settings import PictureOptions
from llava_cli.untrusted_text import printable

_SUBSTITUTED = re.compile(r"/(dev|proc/self)/fd/")


def accept(task: Task) -> None:
    """The check of a source whose rows may all be asked."""


@dataclass
class Source:
    """Where tasks come from: all SOURCEs of a command, one after the other.

    `words` are pictures, folders, archives, tables, lists, files of questions, or "-" for one that comes on stdin.
    `questions` are asked about each picture, or in a file of questions about those that have none of their own.
    `include` are patterns of file names in folders and archives, `null` says that paths of lists end in NUL. Relative
    paths of lists, files of questions and tables begin at `root`, whose default depends on the kind.
    """

    words: Sequence[str]
    questions: Sequence[str] = ()
    include: Sequence[str] = ()
    null: bool = False
    root: str | None = None
    check: Check = accept
    """Raises `UsageError` for a row of questions that cannot be asked."""
    used: Collection[str] = ()
    """Columns of which its questions have fields; it may grow while they are read."""
    pictures: PictureOptions = PictureOptions()  # noqa: RUF009  (immutable)
    """Which pages and frames of its files are asked about."""
    allow_urls: bool = False
    """Whether documents at URLs are fetched to see how many pages they have."""
    skipped: SkippedFiles = field(default_factory=SkippedFiles, init=False)
    """What is in its folders and is not a picture."""
    _left_out: LeftOut = field(default_factory=LeftOut, init=False)

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which finds pictures with it and lists no tasks."""
        return {**vars(self), "each": self.each, "check": accept, "used": tuple(self.used)}

    def missing_here(self) -> str:
        """A folder or file that a process elsewhere needs to find pictures, and has not; empty if it has all."""
        root = self.root if any(one.takes_root for one in self.each) else None
        places = dict.fromkeys(chain(filter(None, [root]), *(one.places for one in self.each)))
        return next((printable(place) for place in places if not os.path.exists(place)), "")

    @property
    def name(self) -> str:
        """As in messages."""
        return shown(self.words[0]) + (f" and {len(self.words) - 1:,} more" if len(self.words) > 1 else "")

    @property
    def is_stdin(self) -> bool:
        """Whether one of its words is stdin."""
        return STDIN in self.words

    @cached_property
    def each(self) -> tuple[OneSource, ...]:
        """Its SOURCEs, in order. Raises a `LlavaError` for one that cannot be read."""
        found = tuple(map(self._open, self.words))
        for one in found:
            if isinstance(one, QuestionsSource):
                one.keep_refused = len(found) > 1
        return found

    def _open(self, word: str) -> OneSource:
        is_single = len(self.words) == 1
        if word == STDIN:
            return self._open_listing(Listing(word, self.null), is_single)
        if os.path.isdir(word):
            return FolderSource(word, is_single, self.root, self.include, self.skipped)
        if container := open_container(word, self.include, self.root):
            reopen = partial(open_container, word, self.include, self.root)
            return ContainerSource(word, container, reopen, is_single)
        if is_cloud_url(word):
            return CloudSource(word)
        is_picture = is_url(word) or foreign_files.is_picture(b"", word) or file_of(word) != word
        return PictureSource(word) if is_picture else self._open_listing(Listing(word, self.null), is_single)

    def _open_listing(self, listing: Listing, is_single: bool) -> OneSource:
        if listing.layout is Layout.PICTURE:
            return PictureSource(listing.source)
        if not listing.is_questions:
            return ListSource(listing, is_single, self.root)
        questions = Questions(listing, self._distinct_questions, self.check, self.used)
        return QuestionsSource(listing, is_single, self.root, questions)

    @cached_property
    def _in_order_of_finding(self) -> list[OneSource]:
        """All but pictures, the most particular names first: those in archives; lists last, which have any names."""

        def rank(one: OneSource) -> tuple[bool, int]:
            return one.names_anything, -len(one.start) if isinstance(one, ContainerSource) else 1

        return sorted((one for one in self.each if not isinstance(one, PictureSource)), key=rank)

    @cached_property
    def _named_pictures(self) -> frozenset[str]:
        """The absolute paths of pictures that are SOURCEs, in place of a search through all of them for each."""
        return frozenset(os.path.abspath(file_of(one.word)) for one in self.each if isinstance(one, PictureSource))

    @property
    def _containers(self) -> list[ContainerSource]:
        return [one for one in self.each if isinstance(one, ContainerSource)]

    @property
    def readers(self) -> int:
        """How many threads may `find` pictures at a time."""
        return min((one.readers for one in self._containers), default=OneSource.readers)

    @property
    def _distinct_questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.questions))

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once."""
        return any(one.is_stream for one in self.each)

    @property
    def must_be_listed(self) -> bool:
        """Whether `find` knows only from its tasks which names it must refuse."""
        return any(isinstance(one, QuestionsSource) and one.keep_refused and not one.is_stream for one in self.each)

    def is_substituted(self, word: str) -> bool:
        """Whether a word is the shell's `<(…)`, whose name means nothing to another command."""
        return word in self.words and _SUBSTITUTED.match(word) is not None and Listing(word).is_stream

    @property
    def folder(self) -> str:
        """Where names of pictures begin: in the only SOURCE, beside it, or in the current folder."""
        return self.each[0].folder if len(self.each) == 1 else ""

    @property
    def origin(self) -> str:
        """`folder` for other commands: absolute and without links, or a URL."""
        return self.folder if "://" in self.folder else os.path.realpath(self.folder)

    def holds(self, image: str) -> bool:
        """Whether `find` reads a picture whose name is a URL: in one of its archives, or as one of its words."""
        return self._is_in_archive(image) or image in self._urls

    def _is_in_archive(self, image: str) -> bool:
        return any(one.start and image.startswith(one.start) for one in self._containers)

    @cached_property
    def _urls(self) -> dict[str, PictureSource]:
        """The pictures at URLs that are SOURCEs, by the names that their rows may have."""
        pictures = [one for one in self.each if isinstance(one, PictureSource)]
        return {name: one for one in reversed(pictures) for name in one.names_of_url}

    def find(self, image: str) -> bytes | Path:
        """The file of a task's picture. Raises `InputMissing` if no SOURCE may name it, or as `Container.read`."""
        if self._is_refused(image):
            raise self._outside(image)
        if picture := self._urls.get(image):
            return picture.fetch()
        if self.allow_urls and is_url(image) and not self._is_in_archive(image):
            return read(image, public=True)
        if self._named_pictures and os.path.abspath(path := local_path(image)) in self._named_pictures:
            return Path(resolve(path))
        for one in self._in_order_of_finding:
            if (file := one.find(image)) is not None:
                return file
        refuse_cloud_url(image)
        raise self._outside(image)

    def _outside(self, image: str) -> InputMissing:
        root = next((one.folder for one in self.each if isinstance(one, QuestionsSource)), self.folder)
        reason = f"is outside {printable(root) or 'the current folder'}"
        return InputMissing(printable(image), reason, "--root FOLDER names another root")

    def _is_refused(self, image: str) -> bool:
        """Whether a file of questions has named it and must not: that another SOURCE may does not help."""
        return any(image in one.refused for one in self.each if isinstance(one, QuestionsSource))

    def checked_tasks(self) -> Iterator[Task] | None:
        """As `tasks`, or None if there are none; files of questions are read once to check them.

        Raises `BadData` or `InputMissing`.
        """
        for one in self.each:
            one.check(self._distinct_questions)
        tasks = self.tasks()
        first = next(tasks, None)
        return None if first is None else chain([first], tasks)

    def tasks(self) -> Iterator[Task]:
        """In the order of the words; in a folder by path. Raises `BadData` for an invalid row of questions."""
        tasks = chain.from_iterable(one.tasks(self._distinct_questions) for one in self.each)
        return with_parts(tasks, self.find, self.pictures, self._left_out)

    def tasks_with_rows(self) -> Iterator[Task]:
        """As `tasks`, of those SOURCEs that say more of a picture than its name; a file is one picture."""
        return chain.from_iterable(one.tasks(self._distinct_questions) for one in self.each if one.has_rows)

    def notes(self) -> list[str]:
        """Lines about what the tasks leave out. Call it after all tasks were read."""
        left_out = [(self.name, self.skipped.note()), (self.name, self._left_out.note())]
        notes = [*left_out, *((one.name, line) for one in self.each for line in one.notes())]
        return [f"llava: {name}: {line}" for name, line in notes if line]

    def empty_reason(self) -> tuple[str, str]:
        """Why there are no tasks, and a hint."""
        return self.each[0].empty_reason()

    def close(self) -> None:
        """Gives back its files and connections."""
        for one in self.each:
            one.close()
