"""Finds the pictures in a folder and below it, and counts what it skips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

from llava_cli import limits
from llava_cli.batch.sources.foreign_files import begins_like_a_picture, is_head_of_picture
from llava_cli.errors import InputMissing, os_reason
from llava_cli.images.reader import SUFFIXES
from llava_cli.untrusted_text import one_line, printable

_SYSTEM_FOLDERS = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "recycler"),
    *("system volume information", "lost+found", "__macosx"),
}
"""Folders that systems keep among the user's, in lower case: thumbnails, deleted files, resource forks."""
_MAX_NAMES = 4
"""Names of each kind that a note lists."""


@dataclass
class SkippedFolders:
    """The number of folders of one kind, and the names of the first few."""

    count: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.count += 1
        if len(self.names) < _MAX_NAMES and name not in self.names:
            self.names.append(name)

    def note(self, singular: str, plural: str) -> list[str]:
        names = [*map(_abbreviated, self.names), *["…"] * (self.count > len(self.names))]
        return [f"{_count(self.count, singular, plural)} ({', '.join(names)})"] if self.count else []


@dataclass
class SkippedFiles:
    """What was found in folders and not taken as a picture."""

    extensions: Counter[str] = field(default_factory=Counter)
    """The number of files by their extension."""
    hidden: int = 0
    system: SkippedFolders = field(default_factory=SkippedFolders)
    links: SkippedFolders = field(default_factory=SkippedFolders)
    unreadable: SkippedFolders = field(default_factory=SkippedFolders)

    def add_file(self, name: str) -> None:
        extension = os.path.splitext(name)[1].lower() or "without ending"
        is_counted = extension in self.extensions or len(self.extensions) < limits.COUNTED_NAMES
        self.extensions[extension if is_counted else "others"] += 1

    def note(self) -> str:
        """One line; empty if nothing was skipped."""
        parts, count = [], self.extensions.total()
        if count:
            most_common = self.extensions.most_common(_MAX_NAMES)
            examples = [f"{files:,} {_abbreviated(extension)}" for extension, files in most_common]
            examples += ["…"] * (len(self.extensions) > _MAX_NAMES)
            no_pictures = _count(count, "file is no picture", "files are no pictures")
            parts.append(f"{no_pictures} ({', '.join(examples)})")
        if self.hidden:
            parts.append(_count(self.hidden, "hidden name", "hidden names"))
        parts += self.system.note("folder of the system's", "folders of the system's")
        parts += self.links.note("linked folder", "linked folders")
        parts += self.unreadable.note("folder cannot be read", "folders cannot be read")
        hints = ["--include takes other names"] * bool(count)
        hints += ["a linked folder can be a SOURCE, too"] * bool(self.links.count)
        return "; ".join([", ".join(parts), *hints]) if parts else ""


def find_pictures(folder: str, include: Sequence[str] = (), skipped: SkippedFiles | None = None) -> Iterator[str]:
    """The pictures in a folder and below it, as paths relative to it, in no order; counts the rest in `skipped`.

    Takes files that match a pattern in `include`, a list of globs of names or paths; without patterns, files with a
    picture's extension or a picture's first bytes, since a camera, a cache or a browser may give them other names.
    Skips hidden names, system folders, and links to folders, which may lead anywhere, even back. Raises `InputMissing`
    if the folder itself cannot be read.
    """
    skipped = skipped or SkippedFiles()
    folders = [""]
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(os.path.join(folder, inside)) as entries:
                for entry in entries:
                    path = os.path.join(inside, entry.name)
                    if entry.name.startswith("."):
                        skipped.hidden += 1
                    elif entry.is_dir(follow_symlinks=False):
                        if entry.name.lower() in _SYSTEM_FOLDERS:
                            skipped.system.add(entry.name)
                        else:
                            folders.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # is_dir() raises for a link to itself
                        skipped.links.add(path)
                    elif _is_included(path, include) or (not include and begins_like_a_picture(entry.path)):
                        yield path
                    elif not include:
                        skipped.add_file(entry.name)
        except OSError as error:
            if not inside:
                raise InputMissing(printable(folder), os_reason(error)) from None
            skipped.unreadable.add(f"{inside}: {os_reason(error)}")


class Selection:
    """Which of an archive's names are taken, by the rules of `find_pictures`; it counts the rest in `skipped`."""

    def __init__(self, include: Sequence[str] = ()) -> None:
        self.include, self.skipped = include, SkippedFiles()
        self._system_folders: set[str] = set()

    def takes(self, path: str, head: Callable[[], bytes]) -> bool:
        """Whether a name is a picture's; `head` gives its first `formats.MAGIC_BYTES`, where the name is none."""
        if self._is_passed_over(path):
            return False
        if _is_included(path, self.include) or (not self.include and is_head_of_picture(head())):
            return True
        if not self.include:
            self.skipped.add_file(path)
        return False

    def is_asked_for(self, path: str) -> bool:
        """Whether one of the patterns names it, if there are any."""
        return bool(self.include) and _is_included(path, self.include)

    def _is_passed_over(self, path: str) -> bool:
        """Whether the name, or that of a folder above it, is hidden or a system's."""
        begin = 0
        for name in path.split("/"):
            end = begin + len(name)
            if name.startswith(".") and name not in (".", ".."):
                self.skipped.hidden += 1
                return True
            if end < len(path) and name.lower() in _SYSTEM_FOLDERS:
                folder = path[:end]
                if folder not in self._system_folders and len(self._system_folders) < limits.COUNTED_NAMES:
                    self._system_folders.add(folder)
                    self.skipped.system.add(name)
                return True
            begin = end + 1
        return False


def _is_included(path: str, include: Sequence[str]) -> bool:
    if not include:
        return path.lower().endswith(SUFFIXES)
    return any(fnmatch(path, pattern) or fnmatch(os.path.basename(path), pattern) for pattern in include)


def _count(count: int, singular: str, plural: str) -> str:
    return f"{count:,} {singular if count == 1 else plural}"


def _abbreviated(name: str) -> str:
    return one_line(name, 80)
