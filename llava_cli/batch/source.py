"""SOURCE -> tasks: a folder, pictures, a list of them, or a file of questions; always in the same order."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path

from llava_cli import files
from llava_cli.batch.containers import open_container
from llava_cli.batch.containers.container import Container, Entry
from llava_cli.batch.folders import SkippedFiles, find_pictures
from llava_cli.batch.listing import STDIN, Layout, Listing
from llava_cli.batch.parts_of_tasks import with_parts
from llava_cli.batch.questions import Check, Questions
from llava_cli.batch.roots import is_below, resolve
from llava_cli.batch.tasks import Task, sort_paths
from llava_cli.errors import InputMissing
from llava_cli.images.reader import is_url, local_path
from llava_cli.settings import PictureOptions
from llava_cli.untrusted_text import printable


@dataclass
class Source:
    """Where tasks come from.

    `words` are one list, one file of questions or "-", or any number of pictures and folders. `questions` are asked
    about each picture, or in a file of questions about those that have none of their own. `include` are patterns of
    file names in folders, `null` says that paths end in NUL. Relative paths begin at `root`, whose default depends on
    the kind of source; all pictures of a file of questions must be below it.
    """

    words: Sequence[str]
    questions: Sequence[str] = ()
    include: Sequence[str] = ()
    null: bool = False
    root: str | None = None
    check: Check = lambda task: None
    """Raises `UsageError` for a row of questions that cannot be asked."""
    used: Collection[str] = ()
    """Columns of which its questions have fields; it may grow while they are read."""
    pictures: PictureOptions = PictureOptions()  # noqa: RUF009  (immutable)
    """Which pages and frames of its files are asked about."""
    skipped: SkippedFiles = field(default_factory=SkippedFiles, init=False)
    """What is in its folders and is not a picture."""
    _first_image: str | None = field(default=None, init=False)
    """The picture of the first task."""

    @property
    def name(self) -> str:
        """As in messages."""
        return printable(self.words[0]) + (f" and {len(self.words) - 1:,} more" if len(self.words) > 1 else "")

    @property
    def is_stdin(self) -> bool:
        return self.words[0] == STDIN

    @cached_property
    def is_folder(self) -> bool:
        """Whether it is a single folder: then pictures are named by their paths below it."""
        return len(self.words) == 1 and os.path.isdir(self.words[0]) and not self.is_stdin

    @cached_property
    def listing(self) -> Listing | None:
        """The list or file of questions; None for pictures and folders."""
        if len(self.words) > 1 or self.is_folder or is_url(self.words[0]):
            return None
        if self._containers:
            return None
        listing = Listing(self.words[0], self.null)
        return None if listing.layout is Layout.PICTURE else listing

    @cached_property
    def _containers(self) -> dict[str, Container]:
        """Those among the words, by how the names of their pictures begin: a single one's are relative to it."""
        found = {word: None if word == STDIN else open_container(word) for word in self.words}
        starts = {word: "" if len(self.words) == 1 else word.rstrip("/") + "/" for word in self.words}
        return {starts[word]: container for word, container in found.items() if container}

    @property
    def readers(self) -> int:
        """How many threads may `find` pictures at a time."""
        return min((container.readers for container in self._containers.values()), default=4)

    @cached_property
    def _questions(self) -> Questions | None:
        if not self.listing or not self.is_questions:
            return None
        return Questions(self.listing, self._distinct_questions, self.check, self.used)

    @property
    def is_questions(self) -> bool:
        """Whether it is a file of questions."""
        return self.listing is not None and self.listing.is_questions

    @property
    def _distinct_questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.questions))

    @property
    def is_stream(self) -> bool:
        """Whether it can be read only once."""
        return self.listing is not None and self.listing.is_stream

    @property
    def folder(self) -> str:
        """Where relative paths begin: at a single folder, beside a file of questions, else in the current folder."""
        if self.root is not None:
            return self.root
        if self.is_folder:
            return self.words[0]
        return os.path.dirname(self.words[0]) if self._questions and not self.is_stream else ""

    @cached_property
    def _real_folder(self) -> str:
        """`folder` without links; cached, because every picture needs it."""
        return os.path.realpath(self.folder)

    @cached_property
    def _named_paths(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """The absolute paths that the user has named, and those of them that are folders."""
        paths = {os.path.abspath(word): os.path.isdir(word) for word in self.words}
        return frozenset(paths), tuple(path for path, is_folder in paths.items() if is_folder)

    def find(self, image: str) -> bytes | Path:
        """The file of a task's picture. Raises as `locate` and `Container.read`."""
        for start, container in self._containers.items():
            if image.startswith(start):
                return container.read(image[len(start) :])
        return Path(self.locate(image))

    def locate(self, image: str) -> str:
        """The real path of a task's picture. Raises `InputMissing` if the source must not name it.

        A file of questions is often a stranger's: its pictures must be below its folder, or below `root`, wherever
        links lead. Within a folder of pictures, links to files are followed, as other programs do it. The paths of a
        list are the user's own, and may be `file:` URLs.
        """
        path = os.path.join(self.folder, local_path(image))
        real_path = resolve(path)
        if self._questions:
            is_inside = is_below(real_path, self._real_folder)
        elif self.listing:
            is_inside = True
        else:  # only a manifest that somebody has changed can name a path outside
            path, (paths, folders) = os.path.abspath(path), self._named_paths
            folders = (os.path.abspath(self.folder),) if self.is_folder else folders
            is_inside = path in paths or any(is_below(path, folder) for folder in folders)
        if not is_inside:
            reason = f"is outside {printable(self.folder) or 'the current folder'}"
            raise InputMissing(printable(image), reason, "--root FOLDER names another root")
        return real_path

    @property
    def is_substituted(self) -> bool:
        """Whether it is the shell's `<(…)`, whose name means nothing to another command."""
        return self.is_stream and re.match(r"/(dev|proc/self)/fd/", self.words[0]) is not None

    def checked_tasks(self) -> Iterator[Task] | None:
        """As `tasks`, or None if there are none; a file of questions is read once to check it.

        Raises `BadData` or `InputMissing`.
        """
        if self._questions and not self.is_stream:
            deque(self._tasks_of_files(), maxlen=0)
        tasks = self.tasks()
        first = next(tasks, None)
        return None if first is None else chain([first], tasks)

    def tasks(self) -> Iterator[Task]:
        """In the order of the source, within a folder by path. Raises `BadData` for an invalid row of questions."""
        return with_parts(self._tasks_of_files(), self.find, self.pictures)

    def _tasks_of_files(self) -> Iterator[Task]:
        """The tasks before files of several pictures become several tasks."""
        for task in self._questions.tasks() if self._questions else self._tasks_of_images():
            self._first_image = self._first_image or task.image
            yield task

    def _tasks_of_images(self) -> Iterator[Task]:
        for image, row in self._images():
            for question in self._distinct_questions:
                yield Task(image, question, row=row)

    def _images(self) -> Iterator[Entry]:
        if self.listing:
            yield from map(Entry, self.listing.paths())
            return
        for word in self.words:
            yield from self._images_in(word)

    def _images_in(self, word: str) -> Iterator[Entry]:
        start = "" if len(self.words) == 1 else word.rstrip("/") + "/"
        if container := self._containers.get(start):
            yield from (Entry(start + name, row) for name, row in container.entries())
        elif is_url(word) or not os.path.isdir(word):
            yield Entry(word)
        else:
            folder = "" if self.is_folder else word
            paths = sort_paths(find_pictures(word, self.include, self.skipped))
            yield from (Entry(os.path.join(folder, path)) for path in paths)

    def notes(self) -> list[str]:
        """Lines about what the tasks leave out. Call it after all tasks were read."""
        lines = [*(container.note() for container in self._containers.values()), self.skipped.note()]
        lines += [self._questions.note() if self._questions else "", self._root_note()]
        return [f"llava: {self.name}: {line}" for line in lines if line]

    def empty_reason(self) -> tuple[str, str]:
        """Why there are no tasks, and a hint."""
        if self.listing:
            return "there is nothing to ask about in it", ""
        if self.skipped == SkippedFiles():
            return "an empty folder", ""
        return "no pictures in it", "--include takes files by name"

    def _root_note(self) -> str:
        """A line if the first picture of a list is not below `folder`: where it is, or how to name the root."""
        first, start = self._first_image, self.folder or os.curdir
        if not (first and self.listing) or re.match("[A-Za-z]{2,}:", first):
            return ""
        if os.path.isabs(first) or os.path.lexists(os.path.join(start, first)):
            return ""
        beside = os.path.dirname(self.words[0]) or os.curdir
        roots = [root for root in (os.curdir, beside) if os.path.lexists(os.path.join(root, first))]
        hint = f"--root {files.quoted(roots[0])} has it" if roots else "--root FOLDER names where its paths begin"
        folder = printable(self.folder) or "the current folder"
        return f"its first picture, {printable(first)}, is not in {folder}; {hint}"
