"""Objects below a URL, to be written as well as read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from llava_cli.errors import LlavaError, OutputError, UsageError
from llava_cli.images.cloud import file_system, read_bytes, service_of
from llava_cli.images.remote_errors import CHANGED, HttpStatus, Patience, failure_of, status_of
from llava_cli.images.remote_names import path_of, scheme_of, shown

_WRITABLE = ("s3", "gs", "gcs", "az", "abfs")
_CONFLICT, _UNAVAILABLE = 409, 503
_ATTEMPTS = 8
"""At each piece of an object that is written piece by piece, which takes half a minute and more."""
_MOST_REMOVED = 1000
"""Objects in one request of S3."""
_BLOCK_BYTES = 16_000_000
"""Of an object that is written piece by piece; S3 takes 10,000 pieces, so 160 GB."""
T = TypeVar("T")


class BucketFiles:
    """The objects whose URLs begin with `url`. All methods raise `OutputError` about `name`."""

    def __init__(self, url: str, name: str) -> None:
        """Raises `UsageError` for a service that cannot be written to, or whose package is missing."""
        scheme = scheme_of(url)
        if scheme not in _WRITABLE:
            raise UsageError("-o", f"{scheme}:// is only read", f"-o {_WRITABLE[0]}://BUCKET/FILE, or a path")
        self._service, self._path, self._name, self._url = service_of(url), path_of(url), name, url

    def _call(self, function: Callable[[Any], T]) -> T:
        """What a function of fsspec's file system returns; tried again while that may help."""
        files, patience = file_system(self._service.protocol), Patience(shown(self._url), self._service.sign_in)
        try:
            return patience.call(lambda: function(files))
        except LlavaError as error:
            raise OutputError(self._name, error.reason, error.hint or "the same command resumes") from None

    def names(self, start: str) -> list[str]:
        """Those of the objects that begin so."""
        found = self._call(lambda files: files.find(self._path, prefix=start))
        return sorted(path.rpartition("/")[2] for path in found)

    def size(self, name: str) -> int | None:
        """Of an object, in bytes; None if there is none."""

        def ask(files: Any) -> int | None:
            try:
                return int(files.info(self._path + name)["size"])
            except FileNotFoundError:
                return None

        return self._call(ask)

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> bytes:
        """An object, or a span of its bytes."""
        return self._call(lambda files: bytes(files.cat_file(self._path + name, start=begin, end=end)))

    def create(self, name: str, data: bytes) -> bool:
        """Puts an object where there is none; False if there is one, or another process has just put it there."""

        def put(files: Any) -> bool:
            try:
                files.pipe_file(self._path + name, data, mode="create")
            except Exception as error:
                if self._is_there(files, name, error):
                    return False
                if status_of(error) == _CONFLICT:  # another put of it is under way, and may fail
                    raise HttpStatus(_UNAVAILABLE) from error
                raise
            return True

        return self._call(put)

    def write(self, name: str, chunks: Iterable[bytes]) -> bool:
        """Writes an object of any size, which is there once it is whole; False if there is one, which stays."""
        files = file_system(self._service.protocol, _ATTEMPTS)
        try:
            file = files.open(self._path + name, "xb", block_size=_BLOCK_BYTES)
            try:
                for chunk in chunks:
                    file.write(chunk)
                file.close()
            except BaseException:
                with suppress(Exception):
                    file.discard()
                file.closed = True  # so that nothing of it is put there when it is collected
                raise
        except LlavaError:
            raise
        except Exception as error:
            if self._is_there(files, name, error):
                return False
            raise OutputError(self._name, failure_of(error).reason, "the same command resumes") from None
        return True

    def _is_there(self, files: Any, name: str, error: Exception) -> bool:
        """Whether an object was not put because there is one."""
        if status_of(error) == _CONFLICT:
            return bool(files.exists(self._path + name))
        return failure_of(error) is CHANGED or isinstance(error, FileExistsError)

    def remove(self, names: Sequence[str]) -> None:
        """Those that are there."""
        for begin in range(0, len(names), _MOST_REMOVED):
            paths = [self._path + name for name in names[begin : begin + _MOST_REMOVED]]
            self._call(lambda files: _remove(files, paths))  # noqa: B023

    def lines(self, name: str) -> list[bytes]:
        """Of an object that fits in memory; none of one that is there no longer."""

        def get(files: Any) -> bytes:
            try:
                return read_bytes(files, self._path + name)
            except FileNotFoundError:
                return b""

        return self._call(get).splitlines(keepends=True)

    def all_lines(self, name: str) -> Iterator[bytes]:
        """Of an object of any size."""
        size, begun = self.size(name) or 0, b""
        for begin in range(0, size, _BLOCK_BYTES):
            lines = (begun + self.read(name, begin, min(begin + _BLOCK_BYTES, size))).splitlines(keepends=True)
            begun = b"" if lines[-1].endswith(b"\n") else lines.pop()
            yield from lines
        if begun:
            yield begun


def _remove(files: Any, paths: list[str]) -> None:
    if hasattr(files, "bulk_delete"):  # of S3
        files.bulk_delete(paths)
        return
    for path in paths:
        with suppress(FileNotFoundError):
            files.rm_file(path)
