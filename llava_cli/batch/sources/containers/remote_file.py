"""An archive or a table on another machine: in a bucket, in a data set, or at an http(s) URL."""

from __future__ import annotations

import re
from typing import BinaryIO

from llava_cli.batch.sources.foreign_files import is_called_tar
from llava_cli.errors import InputMissing, SourceLost
from llava_cli.images.cloud import Cloud
from llava_cli.images.http_file import open_url
from llava_cli.images.reader import SUFFIXES, is_url
from llava_cli.images.remote_names import is_cloud_url, shown, without_secrets
from llava_cli.parts import split_reference

_SUFFIXES = (".zip", ".parquet", ".arrow", ".feather", ".ipc")
"""Of archives and tables, but for a tar's."""


class RemoteFile:
    """Opens a file by URL, each time the same version. A call raises `InputMissing`, from the second on `SourceLost`.

    A tar is read from its beginning to its end: to seek from member to member would take a request for each.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._cloud = Cloud(url) if is_cloud_url(url) else None
        self._is_forward = is_called_tar(without_secrets(url))
        self._version: object = None

    def __call__(self) -> BinaryIO:
        open_file = self._cloud.open if self._cloud else open_url
        try:
            file, version = open_file(self._url, self._is_forward)
        except InputMissing as error:
            raise (SourceLost(error.thing, error.reason, error.hint) if self._version else error) from None
        if version != (self._version or version):
            file.close()
            raise SourceLost(shown(self._url), "it has changed since it was listed", "start the command again")
        self._version = version
        return file


def is_remote(word: str) -> bool:
    """Whether a word is the URL of something that we may read."""
    return is_url(word) or is_cloud_url(word)


def is_archive(url: str) -> bool:
    """Whether a URL is that of an archive or a table, by its suffix."""
    name = without_secrets(url).lower()
    return name.endswith(_SUFFIXES) or is_called_tar(name)


def is_picture_url(url: str) -> bool:
    """Whether a URL is that of one picture, by its suffix."""
    return without_secrets(split_reference(url)[0]).lower().endswith(SUFFIXES) and not is_pattern(url)


def is_pattern(url: str) -> bool:
    """Whether a bucket's URL has a pattern's signs; in others `?` begins a query."""
    return is_cloud_url(url) and re.search(r"[*?]", url) is not None
