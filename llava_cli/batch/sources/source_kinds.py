"""The kinds of SOURCE, one class each: which pictures and questions it has, and which files it may name.

A single SOURCE names its pictures as they are in it. Among several, each name is a path from the current folder, or
`SOURCE/name` for what is in an archive, so that it says which SOURCE it is from.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from llava_cli import files, limits
from llava_cli.batch.roots import is_below, resolve
from llava_cli.batch.sources.containers.container import Container, Entry
from llava_cli.batch.sources.context import bounded_context
from llava_cli.batch.sources.folders import SkippedFiles, find_pictures
from llava_cli.batch.sources.listing import Listing
from llava_cli.batch.sources.questions import Questions
from llava_cli.batch.tasks import Task, expected_answer, is_valid, sort_paths
from llava_cli.errors import BadData, InputMissing
from llava_cli.images.cloud import Cloud
from llava_cli.images.reader import is_url, local_path, read
from llava_cli.images.remote_names import is_cloud_url, shown, without_secrets
from llava_cli.parts import split_reference
from llava_cli.untrusted_text import printable

_URL = re.compile("[A-Za-z]{2,}:")
_OWN_COLUMNS = ("question", "id", "answer")
"""What a row of an archive or table says as one of a questions file does."""


class OneSource:
    """What all kinds have in common."""

    is_stream = False
    """Whether it can be read only once."""
    has_questions = False
    """Whether its rows may have questions of their own."""
    has_rows = False
    """Whether it says more of a picture than its name."""
    names_anything = False
    """Whether it may name any file of this machine."""
    takes_root = False
    """Whether --root names where its paths begin."""
    readers = 4
    """How many threads may `find` its pictures at a time."""

    def __init__(self, word: str) -> None:
        self.word, self.name = word, shown(word)

    @property
    def folder(self) -> str:
        """Where its relative paths begin, if it is the only SOURCE."""
        return ""

    def tasks(self, questions: Sequence[str]) -> Iterator[Task]:
        """A task for each picture and each of the questions, in its order. Raises `BadData` for an invalid row."""
        for image, row in self.images():
            for question in questions:
                yield Task(image, question, row=row)

    def images(self) -> Iterator[Entry]:
        """Its pictures, and what it says of them."""
        raise NotImplementedError

    def begin(self) -> None:
        """Makes sure that it can be listed. Raises a `LlavaError` if not."""

    def check(self, questions: Sequence[str]) -> None:
        """Reads what can be read twice. Raises `BadData` as `tasks`."""

    def find(self, image: str) -> bytes | Path | None:
        """The file of one of its pictures; None for a name that it must not give. Raises as `Container.read`."""
        raise NotImplementedError

    @property
    def places(self) -> list[str]:
        """Files or folders without which none of its pictures is found."""
        return []

    def notes(self) -> list[str]:
        """What its tasks leave out, in a line each."""
        return []

    def empty_reason(self) -> tuple[str, str]:
        """Why it has no tasks, and a hint."""
        return "there is nothing to ask about in it", ""

    def close(self) -> None:
        """Gives back its files."""


class PictureSource(OneSource):
    """A picture: a path, or a URL, whose rows do not tell its password and its query, which may be a signature."""

    def __init__(self, word: str) -> None:
        super().__init__(word)
        self._url, _ = split_reference(word) if is_url(word) else ("", None)
        self.image = without_secrets(self._url) + word[len(self._url) :] if self._url else word
        """What its rows call it."""

    def images(self) -> Iterator[Entry]:
        yield Entry(self.image)

    @property
    def names_of_url(self) -> tuple[str, ...]:
        """What tasks may call it, with or without a page; none of a path."""
        return (self.image, without_secrets(self._url)) if self._url else ()

    @property
    def places(self) -> list[str]:
        """Its folder: the picture itself may be missing everywhere."""
        return [] if self._url else [os.path.dirname(local_path(split_reference(self.word)[0])) or os.curdir]

    def fetch(self) -> bytes:
        """The file at its URL. Raises as `images.reader.read`."""
        return read(self._url, public=True)

    def find(self, image: str) -> Path | None:
        path = local_path(image)
        return Path(resolve(path)) if os.path.abspath(path) == os.path.abspath(self.word) else None


class CloudSource(OneSource):
    """A single file in a bucket, or one of its pages."""

    def images(self) -> Iterator[Entry]:
        yield Entry(self.word)

    def find(self, image: str) -> bytes | None:
        url, _ = split_reference(self.word)
        return Cloud(url).read(url) if image == url else None


class FolderSource(OneSource):
    """A folder and what is below it. Links to files are followed, as other programs do it."""

    def __init__(
        self, word: str, is_single: bool, root: str | None, include: Sequence[str], skipped: SkippedFiles
    ) -> None:
        super().__init__(word)
        self.takes_root, self._root, self._include, self._skipped = is_single, root, include, skipped
        self._named_as = "" if is_single else word
        """What the names of its pictures begin with."""

    @property
    def folder(self) -> str:
        return self.word if self._root is None else self._root

    @property
    def places(self) -> list[str]:
        return [self.word]

    def images(self) -> Iterator[Entry]:
        for path in sort_paths(find_pictures(self.word, self._include, self._skipped)):
            yield Entry(os.path.join(self._named_as, path))

    def find(self, image: str) -> Path | None:
        """Only a manifest that somebody has changed can name a path outside."""
        if not image.startswith(self._named_as):
            return None
        folder = self.word if self._named_as else self.folder
        path = os.path.join("" if self._named_as else folder, local_path(image))
        return Path(resolve(path)) if is_below(os.path.abspath(path), os.path.abspath(folder)) else None

    def empty_reason(self) -> tuple[str, str]:
        if self._skipped == SkippedFiles():
            return "an empty folder", ""
        return "no pictures in it", "--include takes files by name"


class ListSource(OneSource):
    """A list of paths, which are the user's own, and may be `file:` URLs."""

    names_anything = takes_root = True

    def __init__(self, listing: Listing, is_single: bool, root: str | None) -> None:
        super().__init__(listing.source)
        self.listing, self.is_stream, self._root = listing, listing.is_stream, root
        self._start = "" if is_single else self.folder
        self._first: str | None = None

    @property
    def folder(self) -> str:
        return self._root or ""

    @property
    def places(self) -> list[str]:
        return [self.folder] if self.folder else []

    def images(self) -> Iterator[Entry]:
        return (Entry(self._named(path)) for path in self.listing.paths())

    def find(self, image: str) -> Path | None:
        refuse_cloud_url(image)
        return Path(self._path(image))

    def _named(self, path: str) -> str:
        """A path of the list, as a path from the current folder if there are other SOURCEs."""
        self._first = self._first or path
        is_relative = self._start and not is_url(path) and path[:6].lower() != "file:/"
        return os.path.join(self._start, path) if is_relative else path

    def _path(self, image: str) -> str:
        return resolve(os.path.join("" if self._start else self.folder, local_path(image)))

    def notes(self) -> list[str]:
        """Where the first picture is, if it is not where it should be."""
        first, start = split_reference(self._first or "")[0], self.folder or os.curdir
        if not first or _URL.match(first) or os.path.isabs(first) or os.path.lexists(os.path.join(start, first)):
            return []
        beside = os.path.dirname(self.word) or os.curdir
        roots = [root for root in (os.curdir, beside) if os.path.lexists(os.path.join(root, first))]
        hint = f"--root {files.quoted(roots[0])} has it" if roots else "--root FOLDER names where its paths begin"
        folder = printable(self.folder) or "the current folder"
        return [f"its first picture, {printable(first)}, is not in {folder}; {hint}"]


class QuestionsSource(ListSource):
    """A file of questions. It is often a stranger's: its pictures must be below its folder, wherever links lead."""

    has_questions, has_rows, names_anything = True, True, False

    def __init__(self, listing: Listing, is_single: bool, root: str | None, questions: Questions) -> None:
        super().__init__(listing, is_single, root)
        self._questions = questions
        self._real_folder = os.path.realpath(self.folder)  # once, because every picture needs it
        self.refused: set[str] = set()
        """Pictures that it must not name, of those that `keep_refused` has seen."""
        self.keep_refused = False
        """Whether there are other SOURCEs, which may open them."""

    @property
    def folder(self) -> str:
        if self._root is not None:
            return self._root
        return "" if self.listing.is_stream else os.path.dirname(self.word)

    def tasks(self, questions: Sequence[str]) -> Iterator[Task]:
        for task in self._questions.tasks():
            image = self._named(task.image)
            if self.keep_refused and not is_url(image) and not is_cloud_url(image) and self.find(image) is None:
                self._refuse(image)
            yield task.about(image)

    def _refuse(self, image: str) -> None:
        if len(self.refused) >= limits.COUNTED_NAMES and image not in self.refused:
            reason = f"names more than {limits.COUNTED_NAMES:,} pictures outside {printable(self._real_folder)}"
            raise BadData(self.name, reason, "--root FOLDER names another root")
        self.refused.add(image)

    def check(self, questions: Sequence[str]) -> None:
        if not self.is_stream:
            deque(self._questions.tasks(), maxlen=0)

    def find(self, image: str) -> Path | None:
        if is_cloud_url(image):  # which another SOURCE may be
            return None
        path = self._path(image)
        return Path(path) if is_below(path, self._real_folder) else None

    def notes(self) -> list[str]:
        return [self._questions.note(), *super().notes()]


def refuse_cloud_url(image: str) -> None:
    """Raises `InputMissing` for an object of a bucket, which a file that names pictures may not name."""
    if is_cloud_url(image):
        hint = "llava batch s3://BUCKET/FOLDER/ … takes what is in it"
        raise InputMissing(printable(image), "a bucket's objects in a list are not read", hint)


class ContainerSource(OneSource):
    """An archive, a table or a bucket."""

    has_rows = True

    def __init__(
        self, word: str, container: Container, reopen: Callable[[], Container | None], is_single: bool
    ) -> None:
        """`reopen` gives the same container to another process."""
        super().__init__(word)
        self._reopen, self._container = reopen, container
        self.start = "" if is_single else without_secrets(word).rstrip("/") + "/"
        """What the names of its pictures begin with."""
        self.readers, self.has_questions = container.readers, container.has_questions
        self.takes_root = container.has_paths

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_container"}

    @cached_property
    def _container(self) -> Container:
        container = self._reopen()
        assert container, "it was one as it was given to this process"
        return container

    @property
    def places(self) -> list[str]:
        return [] if "://" in self.word else [self.word]

    @property
    def folder(self) -> str:
        """The archive itself, in which its names are."""
        return without_secrets(self.word)

    def begin(self) -> None:
        next(self._container.entries(), None)

    def check(self, questions: Sequence[str]) -> None:
        if self.takes_root or self.has_questions:
            deque(self.tasks(questions), maxlen=0)

    def images(self) -> Iterator[Entry]:
        """Of a table that names URLs, these are names in themselves."""
        entries = self._container.entries()
        return (Entry(name if is_url(name) else self.start + name, row) for name, row in entries)

    def tasks(self, questions: Sequence[str]) -> Iterator[Task]:
        for image, row in self.images():
            values = dict(row or {})
            own: dict[str, Any] = {name: values.pop(name) for name in _OWN_COLUMNS if _is_own(name, values.get(name))}
            asked = [own.pop("question")] if "question" in own else questions
            if not asked:
                place = f"{self.name}, {printable(image)}"
                raise BadData(place, "there is no question about it", "a QUESTION is asked about those without one")
            own["answer"] = expected_answer(own.get("answer"))
            context = bounded_context(values)
            for question in asked:
                yield Task(image, question, row=context, **own)

    def find(self, image: str) -> bytes | Path | None:
        return self._container.read(image[len(self.start) :]) if image.startswith(self.start) else None

    def notes(self) -> list[str]:
        return [self._container.note()]

    def empty_reason(self) -> tuple[str, str]:
        return "no pictures in it", "--include takes others by name"

    def close(self) -> None:
        if "_container" in vars(self):  # not in a process that has found no picture in it
            self._container.close()


def _is_own(name: str, value: Any) -> bool:
    """Whether a value can be what a questions file has under this name; any other is only context."""
    return value is not None and is_valid(name, expected_answer(value) if name == "answer" else value)
