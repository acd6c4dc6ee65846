"""One HTTP/1.1 exchange (RFC 9112) with bounds on its total time, and on the bytes of headers and body.

A socket's own timeout bounds a single read, so a server that sends a byte at a time never reaches it. Here each read,
write and handshake gets what remains of one deadline. No redirects, compression or persistent connections.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import cast

from llava_cli import limits
from llava_cli.http_url import Url

_CHUNK_BYTES = 65_536


class ResponseTooLarge(Exception):
    """A response exceeds a limit, which the message names."""


class NotHttp(OSError):
    """A response is not HTTP."""


class ResponseIncomplete(OSError):
    """A response ended early."""


class Deadline:
    """The end of the `seconds` that something may take, counted from its creation or last restart."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._end = time.monotonic() + self.seconds

    def remaining(self) -> float:
        """The remaining seconds. Raises `TimeoutError` if there are none."""
        remaining = self._end - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("timed out")
        return remaining


def connect_through(proxy: Url, url: Url, deadline: Deadline) -> tuple[socket.socket, str, dict[str, str]]:
    """A connection to a URL's host through a proxy, the target to request there, and headers for the proxy.

    Raises `OSError`.
    """
    connection = connect(proxy.host, proxy.port, deadline)
    proxy_headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
    if not url.is_tls:
        return connection, f"http://{url.authority}{url.target}", proxy_headers
    authority = f"{url.authority}:443" if url.port == 443 else url.authority
    headers = {"Host": authority, "Connection": "keep-alive", **proxy_headers}
    response = send_request(connection, deadline, "CONNECT", authority, headers)
    if response.status != 200:
        response.close()
        raise OSError(f"its proxy answers {response.status}")
    return start_tls(connection, url.host, deadline), url.target, {}


def connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A connection to the first address of a host that accepts one. Raises `OSError`, also `TimeoutError`."""
    return socket.create_connection((host, port), deadline.remaining())


def start_tls(plain: socket.socket, host: str, deadline: Deadline) -> ssl.SSLSocket:
    """TLS with a server whose certificate is for `host`. Closes the socket if that fails, with an `OSError`."""
    try:
        plain.settimeout(deadline.remaining())  # of the whole handshake, not of each read in it
        return tls_context().wrap_socket(plain, server_hostname=host.rstrip("."))
    except BaseException:
        plain.close()
        raise


@cache
def tls_context() -> ssl.SSLContext:
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context()
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def send_request(
    connection: socket.socket,
    deadline: Deadline,
    method: str,
    target: str,
    headers: Mapping[str, str | bytes],
    body: bytes | None = None,
) -> Response:
    """Sends a request and reads the head of the response, which then owns the connection; on an error closes it.

    Raises `OSError` or `ResponseTooLarge`.
    """
    defaults: dict[str, str | bytes] = {"User-Agent": "llava", "Accept-Encoding": "identity", "Connection": "close"}
    if body is not None:
        defaults["Content-Length"] = str(len(body))
    try:
        with suppress(ConnectionError):  # it may refuse before it has read everything
            _send(connection, deadline, _head(method, target, {**defaults, **headers}))
            _send(connection, deadline, body or b"")
        return Response(connection, deadline, method)
    except BaseException:
        connection.close()
        raise


def _head(method: str, target: str, headers: Mapping[str, str | bytes]) -> bytes:
    lines = [f"{method} {target} HTTP/1.1".encode("ascii")]
    for name, value in headers.items():
        lines.append(name.encode("ascii") + b": " + (value if isinstance(value, bytes) else value.encode("latin-1")))
    if any(mark in line for line in lines for mark in b"\r\n\0"):
        raise ValueError("line break in a header")
    return b"\r\n".join([*lines, b"", b""])


def _send(connection: socket.socket, deadline: Deadline, data: bytes) -> None:
    unsent = memoryview(data)
    while unsent:
        connection.settimeout(deadline.remaining())
        unsent = unsent[connection.send(unsent[:_CHUNK_BYTES]) :]


class _BoundedReader(io.RawIOBase):
    """Reads a limited number of bytes from a socket until a deadline."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection, self._deadline = connection, deadline
        self.allow(limits.REPLY_HEAD_BYTES, "headers")

    def allow(self, most: int, what: str) -> None:
        """Allows about `most` bytes from here on (they are read in chunks); `what` they are is for the error."""
        self._most, self._what, self._remaining = most, what, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # which takes any buffer
        if self._remaining <= 0:
            raise ResponseTooLarge(f"{self._what} larger than {_size(self._most)}")
        self._connection.settimeout(self._deadline.remaining())
        count = self._connection.recv_into(buffer)
        self._remaining -= count
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """Makes this a socket for `http.client`."""
        return io.BufferedReader(self)


class Response:
    """A response. All methods that read raise `OSError` (`TimeoutError` at the deadline) or `ResponseTooLarge`."""

    def __init__(self, connection: socket.socket, deadline: Deadline, method: str = "GET") -> None:
        self.deadline = deadline
        self._connection, self._reader = connection, _BoundedReader(connection, deadline)
        self._response = http.client.HTTPResponse(cast(socket.socket, self._reader), method=method)
        with _http_errors():
            self._response.begin()
        self.status = self._response.status

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def chunks(self, most: int) -> Iterator[bytes]:
        """The body as it arrives, at most `most` bytes."""
        # The framing of chunked encoding counts too: a server may send little else.
        self._reader.allow(2 * most + _CHUNK_BYTES, "marks around chunks")
        size, expected = 0, self._response.length
        while size != expected:
            with _http_errors():
                chunk = self._response.read1(_CHUNK_BYTES if expected is None else min(_CHUNK_BYTES, expected - size))
            if not chunk:
                break
            size += len(chunk)
            if size > most:
                raise ResponseTooLarge(f"larger than {_size(most)}")
            yield chunk
        if expected and size < expected:
            raise ResponseIncomplete(_ENDED_EARLY)

    def read(self, most: int) -> bytes:
        """The whole body, at most `most` bytes."""
        data = io.BytesIO()  # linear time even for chunks of one byte
        for chunk in self.chunks(most):
            data.write(chunk)
        return data.getvalue()

    def lines(self, most: int, most_in_line: int) -> Iterator[bytes]:
        """The body's lines with their line ends; the body has at most `most` bytes."""
        line = bytearray()
        for chunk in self.chunks(most):
            for part in chunk.splitlines(keepends=True):
                line += part
                if len(line) > most_in_line:
                    raise ResponseTooLarge(f"a line longer than {_size(most_in_line)}")
                if part.endswith((b"\n", b"\r")):
                    yield bytes(line)
                    line.clear()
        if line:
            yield bytes(line)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


def _size(count: int) -> str:
    return f"{count // 1_000_000} MB" if count >= 1_000_000 else f"{count:,} bytes"


_ENDED_EARLY = "peer closed connection too early"


@contextmanager
def _http_errors() -> Iterator[None]:
    """Translates what `http.client` raises."""
    try:
        yield
    except ConnectionError:  # one of them is an HTTPException as well
        raise
    except http.client.LineTooLong:
        raise ResponseTooLarge(f"headers larger than {_size(limits.REPLY_HEAD_BYTES)}") from None
    except http.client.IncompleteRead:
        raise ResponseIncomplete(_ENDED_EARLY) from None
    except (http.client.HTTPException, ValueError):
        raise NotHttp("does not speak HTTP") from None
