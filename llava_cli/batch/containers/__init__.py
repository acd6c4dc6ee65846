"""What holds pictures and is no folder: archives, tables, buckets. `open_container` knows which of them a SOURCE is."""

from __future__ import annotations

from llava_cli.batch.containers.container import Container


def open_container(word: str) -> Container | None:
    """The container that a SOURCE is; None for a file that is none, a folder or a URL of a picture.

    Only its first bytes are read. Raises a `LlavaError` if it cannot be opened.
    """
    return None
