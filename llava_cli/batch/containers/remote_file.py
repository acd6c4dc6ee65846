"""An archive or a table on another machine: in a bucket, in a data set, or at an http(s) URL."""

from __future__ import annotations

from typing import BinaryIO

from llava_cli.batch.foreign_files import is_called_tar
from llava_cli.errors import InputMissing, SourceLost
from llava_cli.images.cloud import Cloud
from llava_cli.images.http_file import open_url
from llava_cli.images.remote_names import is_cloud_url, shown, without_secrets


class RemoteFile:
    """Opens a file by URL, each time the same version. A call raises `InputMissing`, which is a `SourceLost` but for the first.

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
