"""What holds pictures and is no folder: archives, tables, buckets. `open_container` knows which of them a SOURCE is."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence

from llava_cli.batch.sources.containers.archive_file import LocalFile, reading
from llava_cli.batch.sources.containers.bucket import Bucket
from llava_cli.batch.sources.containers.compression import FORMATS, UNPACK_ERRORS, unpacking
from llava_cli.batch.sources.containers.container import Container, OpenFile
from llava_cli.batch.sources.containers.remote_file import RemoteFile, is_archive, is_picture_url, is_remote
from llava_cli.batch.sources.containers.table import Table
from llava_cli.batch.sources.containers.tar_archive import TarArchive
from llava_cli.batch.sources.containers.tar_headers import BLOCK, is_header
from llava_cli.batch.sources.containers.zip_archive import ZipArchive
from llava_cli.batch.sources.foreign_files import HEAD_BYTES, is_called_tar, is_document_in_zip, is_picture
from llava_cli.errors import BadData
from llava_cli.images import formats
from llava_cli.images.remote_names import is_cloud_url, shown, without_secrets
from llava_cli.untrusted_text import printable

_STREAM, _STREAM_SUFFIXES = b"\xff\xff\xff\xff", (".arrow", ".arrows", ".ipc", ".feather")


def open_container(word: str, include: Sequence[str] = (), root: str | None = None) -> Container | None:
    """The container that a SOURCE is; None for a file that is none, a folder or a URL of a picture.

    Only its first bytes are read. `include` are patterns of the names that are taken, as of `find_pictures`; `root` is
    where the paths of a table begin. Raises a `LlavaError` if it cannot be opened.
    """
    if is_remote(word):
        return _remote(word, include)
    try:
        is_file = stat.S_ISREG(os.stat(word).st_mode)
    except (OSError, ValueError):
        return None
    if not is_file or is_picture(b"", word):
        return None
    return container_in(word, LocalFile(word), include, os.path.dirname(word) if root is None else root)


def _remote(url: str, include: Sequence[str]) -> Container | None:
    """The container at a URL; None for a picture."""
    if not is_archive(url):
        return Bucket(url, include) if is_cloud_url(url) and not is_picture_url(url) else None
    if container := container_in(without_secrets(url), RemoteFile(url), include):
        return container
    raise BadData(shown(url), "neither an archive nor a table")


def container_in(
    name: str, open_file: OpenFile, include: Sequence[str] = (), folder: str | None = None
) -> Container | None:
    """The archive or table that a file is, wherever it is, by its first bytes; None if it is neither.

    Pictures whose paths a table has are below `folder`. Raises as `open_container`.
    """
    with reading(printable(name)), open_file() as file:
        head, is_seekable = file.read(HEAD_BYTES), file.seekable()
    kind = formats.format_of(head, ("zip", *FORMATS), maybe_text=True)
    if kind == "zip" and not is_document_in_zip(head):
        return ZipArchive(name, open_file, include)
    if is_header(head[:BLOCK]):
        return TarArchive(name, open_file, not is_seekable, include)
    if table := _table_format(head, name):
        return Table(name, open_file, table, folder)
    if kind in FORMATS:
        unpack = unpacking(printable(name), kind, open_file)
        if _begins_with_tar(unpack, name):
            return TarArchive(name, unpack, True, include)
    return None


def _table_format(head: bytes, name: str) -> str | None:
    """How a table is stored. Streams of Arrow begin with four bytes that only mark them, so they are known by name."""
    if head.startswith(_STREAM) and name.lower().endswith(_STREAM_SUFFIXES):
        return "stream"
    return formats.format_of(head, ("parquet", "arrow"), maybe_text=True)


def _begins_with_tar(open_file: OpenFile, name: str) -> bool:
    """Whether a compressed file is a tar. Raises `BadData` for one that is called so and cannot be unpacked here."""
    try:
        with open_file() as file:
            return is_header(file.read(BLOCK))
    except UNPACK_ERRORS:
        return False
    except BadData:
        if is_called_tar(name):
            raise
        return False
