"""An archive at an http(s) URL, read from anywhere in it: each seek asks for the bytes from there on (RFC 9110, 14).

A connection that breaks off is made anew from where it broke, if the server still has the same file.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from llava_cli import limits
from llava_cli.bounded_http import Deadline, Response, ResponseTooLarge
from llava_cli.errors import BadData, InputMissing, SourceLost, UsageError
from llava_cli.http_url import UnusableProxy
from llava_cli.images.fetch import request
from llava_cli.images.remote_errors import HttpStatus, Patience
from llava_cli.images.remote_names import shown

_BUFFER_BYTES = 1 << 18
_READ_ON_BYTES = 1 << 18
"""A seek that goes no further ahead reads on: that takes less time than another request."""
_OK, _PARTIAL, _NOT_SATISFIABLE = 200, 206, 416


def open_url(url: str, is_forward: bool) -> tuple[BinaryIO, object]:
    """A file that the user names, and what tells its versions apart; with `is_forward` it is read to its end only.

    It is not `seekable()` if its server does not know ranges. Opening raises `InputMissing`, reading `SourceLost` if the
    bytes do not arrive; both raise `UsageError` for an unusable proxy.
    """
    raw = _HttpFile(url, is_forward)
    return cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES)), raw.version


class _HttpFile(io.RawIOBase):
    def __init__(self, url: str, is_forward: bool) -> None:
        self._url, self._name, self._is_forward = url, shown(url), is_forward
        self._patience, self._deadline = Patience(shown(url)), Deadline(limits.REMOTE_STALL_SECONDS)
        self._response: Response | None = None
        self._chunks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")
        """What has arrived and was not read."""
        self._at = 0
        self._size: int | None = None
        self.version: tuple[int | None, str | None] | None = None
        """The size, and the entity tag or date, of the first answer."""
        self._knows_ranges = False
        self._patience.call(self._connect)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._knows_ranges and not self._is_forward

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if not self.seekable():
            raise io.UnsupportedOperation("its server does not know ranges")
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size or 0}[whence]
        target = max(start + offset, 0)
        if not self._at <= target <= self._at + _READ_ON_BYTES:
            self._disconnect()
            self._at = target
        while self._at < target and self.read(min(target - self._at, _BUFFER_BYTES)):
            pass
        self._at = target  # also behind the end
        return target

    def readinto(self, buffer: Any) -> int:
        return self._patience.call(lambda: self._read_some(buffer), is_in_use=True)

    def _read_some(self, buffer: Any) -> int:
        """Reads what has arrived, of the next part at most; the position moves only if that succeeds."""
        if not len(buffer) or (self._size is not None and self._at >= self._size):
            return 0
        if self._response is None:
            self._connect()
        try:
            self._deadline.restart()
            if not self._rest:
                self._rest = memoryview(next(self._chunks, b""))
        except ResponseTooLarge as error:
            raise BadData(self._name, str(error)) from None
        except OSError:
            self._disconnect()
            raise
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        self._at += count
        return count

    def _connect(self) -> None:
        """Asks for the bytes from the position on."""
        self._deadline.restart()
        try:
            response = request(self._url, {"Range": f"bytes={self._at}-"}, self._deadline)
        except UnusableProxy as error:
            raise UsageError(self._name, f"the proxy for it is {error}", error.hint) from None
        except ValueError as error:
            raise InputMissing(self._name, str(error)) from None
        try:
            self._accept(response)
        except BaseException:
            response.close()
            raise
        self._response, self._chunks = response, response.chunks(limits.REMOTE_BYTES)
        skipped = self._at if response.status == _OK else 0
        while skipped > 0:  # a server that does not know ranges begins again
            self._deadline.restart()
            chunk = next(self._chunks, b"")
            skipped -= len(chunk)
            if skipped < 0:
                self._rest = memoryview(chunk)[skipped:]
            elif not chunk:
                raise SourceLost(self._name, "it changed while it was read", "the same command begins again")

    def _accept(self, response: Response) -> None:
        """Takes over what the head of a response says. Raises `InputMissing` if it is about another file."""
        total = re.fullmatch(r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})", response.header("Content-Range") or "")
        if response.status == _NOT_SATISFIABLE and total and int(total[2]) <= self._at:
            size = int(total[2])
        elif response.status == _PARTIAL and total and total[1] and int(total[1]) == self._at:
            size, self._knows_ranges = int(total[2]), True
        elif response.status == _OK:
            length = response.header("Content-Length") or ""
            size = int(length) if re.fullmatch(r"\d{1,18}", length) else -1
        else:
            raise HttpStatus(response.status)
        tag = response.header("ETag") or response.header("Last-Modified")
        version = None if size < 0 else size, tag
        if version != (self.version or version):
            raise SourceLost(self._name, "it changed while it was read", "the same command begins again")
        self._size, self.version = version[0], version

    def _disconnect(self) -> None:
        if self._response:
            self._response.close()
        self._response, self._chunks, self._rest = None, iter(()), memoryview(b"")

    def close(self) -> None:
        self._disconnect()
        super().close()
