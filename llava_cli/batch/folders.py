"""The pictures in a folder and those below it, and what else is there: passed over, but counted."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from llava_cli import limits
from llava_cli.batch.foreign_files import begins_like_a_picture
from llava_cli.errors import InputMissing
from llava_cli.images.reader import SUFFIXES
from llava_cli.untrusted_text import one_line, printable

_NOT_THE_USERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler"),
    *("system volume information", "lost+found", "__macosx"),
}
"""Folders that systems keep beside pictures, in lower case: thumbnails of them, what was deleted, forks of files."""
_SAID = 4
"""Names of a kind that are told."""


@dataclass
class Folders:
    """Folders of one kind, and the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.first) < _SAID and name not in self.first:
            self.first.append(name)

    def said(self, what: str, whats: str) -> list[str]:
        names = [*map(_short, self.first), *["…"] * (self.count > len(self.first))]
        return [f"{_count(self.count, what, whats)} ({', '.join(names)})"] if self.count else []


@dataclass
class PassedOver:
    """What a walk did not take."""

    endings: Counter[str] = field(default_factory=Counter)
    """Of files that are not called like pictures."""
    hidden: int = 0
    system: Folders = field(default_factory=Folders)
    links: Folders = field(default_factory=Folders)
    unreadable: Folders = field(default_factory=Folders)

    def add_file(self, name: str) -> None:
        ending = os.path.splitext(name)[1].lower() or "without ending"
        self.endings[ending if ending in self.endings or len(self.endings) < limits.COUNTED_NAMES else "others"] += 1

    def note(self) -> str:
        """All of it in one line; nothing where everything was taken."""
        parts, count = [], self.endings.total()
        if count:
            endings = [f"{many:,} {_short(ending)}" for ending, many in self.endings.most_common(_SAID)]
            rest = ["…"] * (len(self.endings) > _SAID)
            no_pictures = _count(count, "file is no picture", "files are no pictures")
            parts.append(f"{no_pictures} ({', '.join([*endings, *rest])})")
        if self.hidden:
            parts.append(_count(self.hidden, "hidden name", "hidden names"))
        parts += self.system.said("folder of the system's", "folders of the system's")
        parts += self.links.said("linked folder", "linked folders")
        parts += self.unreadable.said("folder cannot be read", "folders cannot be read")
        ways = ["--include takes other names"] * bool(count)
        ways += ["a linked folder can be a SOURCE, too"] * bool(self.links.count)
        return "; ".join([", ".join(parts), *ways]) if parts else ""


def walk(folder: str, include: Sequence[str] = (), passed: PassedOver | None = None) -> Iterator[str]:
    """The pictures in a folder and those below it, as paths from it; in no order.

    Hidden names are passed over, as are folders that systems keep there. Links to files are followed, those to folders
    are not: they may lead anywhere, and back. What is a picture is told by `include`, patterns of names or paths, else
    by its ending, or by how it begins: what a camera, a cache or a browser has saved may have another name. Raises
    `InputMissing` where the folder itself cannot be read; one below it is `passed` over.
    """
    passed = passed or PassedOver()
    folders = [""]
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                for entry in entries:
                    path = os.path.join(inside, entry.name)
                    if entry.name.startswith("."):
                        passed.hidden += 1
                    elif entry.is_dir(follow_symlinks=False):
                        if entry.name.lower() in _NOT_THE_USERS:
                            passed.system.add(entry.name)
                        else:
                            folders.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # is_dir() raises for a link to itself
                        passed.links.add(path)
                    elif _included(path, include) or (not include and begins_like_a_picture(entry.path)):
                        yield path
                    elif not include:
                        passed.add_file(entry.name)
        except OSError as error:
            if not inside:
                raise InputMissing(printable(folder), (error.strerror or str(error)).lower()) from None
            passed.unreadable.add(f"{inside}: {(error.strerror or str(error)).lower()}")


def _included(path: str, include: Sequence[str]) -> bool:
    if not include:
        return path.lower().endswith(SUFFIXES)
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in include)


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _short(name: str) -> str:
    return one_line(name, 80)
