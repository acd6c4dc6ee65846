"""SOURCE: a folder, pictures, a list or questions -> tasks, in an order that stays the same."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from glob import glob, has_magic
from itertools import chain
from pathlib import Path

from llava_cli import files
from llava_cli.batch.folders import PassedOver, walk
from llava_cli.batch.listing import STDIN, Layout, Listing
from llava_cli.batch.questions import Questions
from llava_cli.batch.roots import is_below, resolved
from llava_cli.batch.tasks import Task, in_order
from llava_cli.errors import InputMissing, UsageError
from llava_cli.images.reader import SUFFIXES, is_url, local_path
from llava_cli.untrusted_text import printable

USAGE = 'llava batch photos/ "describe the photo" -o out.jsonl'
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def split(words: Sequence[str]) -> tuple[list[str], str | None]:
    """`SOURCE... [QUESTION]`: the sources, and the question if the last word is one."""
    *sources, last = words
    return (list(words), None) if not sources or _is_source(last) else (sources, last)


def _is_source(word: str) -> bool:
    """Whether a last word is no question: it is there, or looks like a picture. Sentences may end in a file's name."""
    looks = word == STDIN or is_url(word) or word.lower().endswith(SUFFIXES)
    return os.path.lexists(word) or (looks and not re.search(r"\s", word))


def expanded(words: Sequence[str]) -> list[str]:
    """The words as a shell would hand them over: some do not expand `*.jpg`, and none does inside of quotes.

    Raises `InputMissing` for what is not there.
    """
    found: list[str] = []
    for word in words:
        if not word:
            raise UsageError("SOURCE", "there is none", USAGE)
        found += [word] if word == STDIN or is_url(word) or os.path.lexists(word) else _expanded(word, words)
    return found


def _expanded(word: str, words: Sequence[str]) -> list[str]:
    """What a word stands for that is no name of a file."""
    plain = os.path.expandvars(os.path.expanduser(local_path(word)))
    names = sorted(glob(plain, recursive=True)) if has_magic(plain) else [plain] * os.path.lexists(plain)
    if names:
        return names
    name, folder, hint = printable(word), os.path.dirname(plain), ""
    if _SCHEME.match(word):
        raise InputMissing(name, "a URL that is not fetched: only http and https are", "download it first")
    is_sentence = re.search(r"\s", word) and not folder
    if re.search("[*?]", plain) and not is_sentence:
        hint = f"llava batch {files.quoted(folder or '.')} QUESTION takes all pictures below it"
        raise InputMissing(name, "no file has a name like that", hint if os.path.isdir(folder or ".") else "")
    if is_sentence and len(words) > 1:
        hint = f"the question comes last: llava batch SOURCE {files.quoted(word)}"
    elif word is not words[0] and not re.search(r"[./\\]", word):
        hint = "a question of several words is in quotes: " + files.quoted(" ".join(words[words.index(word) :]) + " …")
    raise InputMissing(name, "no such file or folder", hint)


@dataclass
class Source:
    """Where tasks come from.

    `words` are one list, one file of questions or "-", or any number of pictures and folders. `questions` are asked
    about each picture, in a questions file about those that have none of their own. `include` are patterns of file
    names in a folder; `null` says that paths end in NUL; `root` is where relative paths begin (None: by the kind of
    source), and for a questions file also what all of its pictures are below.
    """

    words: Sequence[str]
    questions: Sequence[str] = ()
    include: Sequence[str] = ()
    null: bool = False
    root: str | None = None
    passed: PassedOver = field(default_factory=PassedOver, init=False)
    """What the walk through its folders did not take."""
    _first: str | None = field(default=None, init=False)
    """The picture of the first task."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return printable(self.words[0]) + (f" and {len(self.words) - 1:,} more" if len(self.words) > 1 else "")

    @property
    def is_stdin(self) -> bool:
        return self.words[0] == STDIN

    @cached_property
    def is_folder(self) -> bool:
        """Whether it is one folder, whose pictures are called by their paths from there."""
        return len(self.words) == 1 and os.path.isdir(self.words[0]) and not self.is_stdin

    @cached_property
    def listing(self) -> Listing | None:
        """The list or questions file that it is."""
        if len(self.words) > 1 or self.is_folder or is_url(self.words[0]):
            return None
        listing = Listing(self.words[0], self.null)
        return None if listing.layout is Layout.PICTURE else listing

    @cached_property
    def _questions(self) -> Questions | None:
        listing = self.listing
        return Questions(listing, self._common) if listing and listing.is_questions else None

    @property
    def _common(self) -> tuple[str, ...]:
        """The questions about each picture, none of them twice."""
        return tuple(dict.fromkeys(self.questions))

    @property
    def is_stream(self) -> bool:
        """Whether it can be read once only."""
        return self.listing is not None and self.listing.is_stream

    @property
    def folder(self) -> str:
        """Where relative paths begin: the folder itself, a questions file's own, else the current one."""
        if self.root is not None:
            return self.root
        if self.is_folder:
            return self.words[0]
        return os.path.dirname(self.words[0]) if self._questions and not self.is_stream else ""

    @cached_property
    def _real_folder(self) -> str:
        """Where `folder` leads; looked up once, for it is asked of each picture."""
        return os.path.realpath(self.folder)

    @cached_property
    def _named(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """The pictures and folders that are its words."""
        paths = {os.path.abspath(word): os.path.isdir(word) for word in self.words}
        return frozenset(paths), tuple(path for path, is_folder in paths.items() if is_folder)

    def locate(self, image: str) -> str:
        """Where the path of a task's picture leads. Raises `InputMissing` for one that its source may not name.

        Whoever wrote a questions file is often a stranger: what it names is below its folder, or the one that the user
        names, wherever links lead. In a folder of pictures links to files are followed, as other programs do it. The
        paths of a list are the user's own, and may be `file:` URLs.
        """
        path = os.path.join(self.folder, local_path(image))
        found = resolved(path)
        if self._questions:
            is_inside = is_below(found, self._real_folder)
        elif self.listing:
            is_inside = True
        else:  # what leads out is said by a manifest, neither by a folder nor by the user
            path, (paths, folders) = os.path.abspath(path), self._named
            folders = (os.path.abspath(self.folder),) if self.is_folder else folders
            is_inside = path in paths or any(is_below(path, folder) for folder in folders)
        if not is_inside:
            reason = f"is outside {printable(self.folder) or 'the current folder'}"
            raise InputMissing(printable(image), reason, "--root FOLDER names another root")
        return found

    @property
    def is_substituted(self) -> bool:
        """Whether the shell made a name for it that is no other command's: `<(…)`."""
        return self.is_stream and re.match(r"/(dev|proc/self)/fd/", self.words[0]) is not None

    def check(self, allow_urls: bool = False, output: Path | None = None) -> None:
        """Raises what would go wrong, before anything is loaded or written."""
        for url in filter(is_url, () if allow_urls else self.words):
            hint = f"--allow-urls fetches a picture; a list: curl -L {files.quoted(url)} | llava batch - …"
            raise UsageError(printable(url), "a URL", hint)
        if output is not None and self._has(output):
            raise UsageError("-o", f"{printable(str(output))} is a SOURCE", "give another file to -o")
        if self.is_stdin and (sys.stdin is None or sys.stdin.isatty()):
            raise UsageError(STDIN, "no paths on stdin", 'find . -name "*.jpg" | llava batch - "what is this?"')
        if any(not question.strip() for question in self.questions):
            raise UsageError("QUESTION", "it is empty", USAGE)
        for word in self.words if len(self.words) > 1 else ():
            self._check_word(word)
        if self.is_stdin and not self.listing:
            raise UsageError(STDIN, "a picture on stdin, not a list of them", "llava ask - QUESTION takes one")
        if not self._questions and not self.questions:
            raise UsageError("QUESTION", "there is none", self._with_question())
        if self.root is not None and not self.listing and not self.is_folder:
            raise UsageError("--root", "is about lists and questions files", USAGE)

    def _has(self, output: Path) -> bool:
        """Whether a file is one of those that are read."""
        for word in self.words:
            with suppress(OSError, ValueError, AttributeError):  # it is new, a URL, or a stdin that is no file
                there = os.fstat(sys.stdin.fileno()) if word == STDIN else os.stat(word)
                if stat.S_ISREG(there.st_mode) and os.path.samestat(there, os.stat(output)):
                    return True
        return False

    def _check_word(self, word: str) -> None:
        """Raises for one of several words that goes alone, or is nothing of ours."""
        if os.path.isdir(word) or is_url(word) or word.lower().endswith(SUFFIXES):
            return
        listing = Listing(word, self.null)
        if word == STDIN or listing.layout is not Layout.PICTURE:
            what = "questions" if word != STDIN and listing.is_questions else "a list"
            hint = f"llava batch {listing.typed} …; or join them: cat FILES | llava batch - …"
            raise UsageError(listing.name, f"{what} among other SOURCEs", hint)

    def _with_question(self) -> str:
        if len(self.words) > 1 and not self.words[-1].lower().endswith(SUFFIXES):
            return f"the last word is a file or folder; --question {files.quoted(self.words[-1])} asks it"
        first = files.quoted(self.words[0])
        return f'llava batch {first}{" …" * (len(self.words) > 1)} "what is this?"'

    def ready(self) -> Iterator[Task] | None:
        """`tasks`, of which all that can be known is looked at now; None where there are none.

        Raises `BadData` or `InputMissing`.
        """
        if self._questions and not self.is_stream:
            deque(self.tasks(), maxlen=0)
        tasks = self.tasks()
        first = next(tasks, None)
        return None if first is None else chain([first], tasks)

    def tasks(self) -> Iterator[Task]:
        """In the source's order, a folder's by path; raises `BadData` for a line of questions that is none."""
        tasks = self._questions.tasks() if self._questions else self._asked()
        for task in tasks:
            self._first = self._first or task.image
            yield task

    def _asked(self) -> Iterator[Task]:
        for image in self._images():
            for question in self._common:
                yield Task(image, question)

    def _images(self) -> Iterator[str]:
        if self.listing:
            yield from self.listing.paths()
            return
        for word in self.words:
            if is_url(word) or not os.path.isdir(word):
                yield word
            else:
                start = "" if self.is_folder else word
                yield from (os.path.join(start, path) for path in in_order(walk(word, self.include, self.passed)))

    def notes(self) -> list[str]:
        """What there is to say of what its tasks have left out; each is one line."""
        lines = [self.passed.note(), self._questions.note() if self._questions else "", self._elsewhere()]
        return [f"llava: {self.name}: {line}" for line in lines if line]

    def why_nothing(self) -> tuple[str, str]:
        """Why there are no tasks, and what to try."""
        if self.listing:
            return "there is nothing to ask about in it", ""
        if self.passed == PassedOver():
            return "an empty folder", ""
        return "no pictures in it", "--include takes files by name"

    def _elsewhere(self) -> str:
        """Where the first picture of a list is that is not where its paths begin."""
        first, begin = self._first, self.folder or os.curdir
        if (
            not (first and self.listing)
            or re.match("[A-Za-z]{2,}:", first)
            or os.path.lexists(os.path.join(begin, first))
        ):
            return ""
        beside = os.path.dirname(self.words[0]) or os.curdir
        roots = [root for root in (os.curdir, beside) if os.path.lexists(os.path.join(root, first))]
        hint = f"--root {files.quoted(roots[0])} has it" if roots else "--root FOLDER names where its paths begin"
        there = printable(self.folder) or "the current folder"
        return "" if os.path.isabs(first) else f"its first picture, {printable(first)}, is not in {there}; {hint}"
