"""What holds pictures and is no folder: archives, tables, buckets. `open_container` knows which of them a SOURCE is."""

from __future__ import annotations

from collections.abc import Sequence

from llava_cli.batch.containers.container import Container, OpenFile


def open_container(word: str, include: Sequence[str] = (), root: str | None = None) -> Container | None:
    """The container that a SOURCE is; None for a file that is none, a folder or a URL of a picture.

    Only its first bytes are read. `include` are patterns of the names that are taken, as of `find_pictures`; `root` is
    where the paths of a table begin. Raises a `LlavaError` if it cannot be opened.
    """
    return None


def container_in(name: str, open_file: OpenFile, include: Sequence[str] = ()) -> Container | None:
    """The archive or table that a file elsewhere is, by its first bytes and its name; None if it is neither.

    Raises as `open_container`.
    """
    return None
