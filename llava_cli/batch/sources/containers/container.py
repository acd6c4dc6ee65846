"""What every container of pictures has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

OpenFile = Callable[[], BinaryIO]
"""Opens a container's bytes at their beginning, anew at each call; raises a `LlavaError` or an `OSError`.

What is not `seekable()` is read from its beginning to its end, once to list it and once for its pictures.
"""


class Entry(NamedTuple):
    """A picture in a container."""

    name: str
    """The same each time it is listed, relative, with `/` between its parts; unique unless it is a file's path."""
    row: dict[str, Any] | None = None
    """What else the container says of it: a table's other columns, the `.json` beside a WebDataset's picture."""


class Container(Protocol):
    """Pictures by name. Used by several threads at a time unless `readers` is 1."""

    readers: int
    """How many pictures are best read at a time; 1 where they are read in the order of `entries` only."""
    has_questions: bool
    """Whether its rows have questions of their own, so that none needs to be asked of all."""
    has_paths: bool
    """Whether it names files of this disk, whose paths begin at `--root`."""

    def entries(self) -> Iterator[Entry]:
        """All pictures, in an order that is the same each time. Raises a `LlavaError` if they cannot be listed."""

    def read(self, name: str) -> bytes | Path:
        """A picture's bytes, at most `limits.PICTURE_BYTES`, or the path of a file on this disk that has them.

        Raises `InputMissing`, or `BadImage` for one that is too large.
        """

    def note(self) -> str:
        """What `entries` passed over, in one line; empty if nothing, or if it was not called."""

    def close(self) -> None:
        """Gives back files, connections and threads."""
