"""One exchange with an HTTP server, bounded as a whole: its seconds, and the bytes of its head and its body.

A socket's own timeout bounds one read, and a server that sends a byte at a time never reaches it. Here each read, write
and handshake gets what is left of one deadline. Nothing is followed, unpacked or kept open.
"""

from __future__ import annotations

import http.client
import io
import os
import socket
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import cast
from urllib.parse import quote, unquote_to_bytes, urlsplit

from llava_cli import limits

_PIECE = 65_536
_SAFE = "%/:=&?~+!$,;'@()*[]"
"""What stays as it is in a path or query: what may be in one, and what is escaped already."""


class TooLarge(Exception):
    """More came than may: `str` names the limit."""


class NotHttp(OSError):
    """What came is no HTTP."""


class Incomplete(OSError):
    """What came ended before it was whole."""


class Deadline:
    """The end of the `seconds` that something may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        """Gives all of the time again."""
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """The seconds that are left. Raises `TimeoutError` where none are."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


@dataclass(frozen=True)
class Url:
    """An http(s) URL in the parts that are sent. All ASCII, and without line breaks."""

    is_tls: bool
    host: str
    port: int
    target: str
    """Path and query."""
    authorization: str | None
    """The header for the name and password in it."""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Raises `ValueError` for what is no http(s) URL."""
        if len(text) > limits.REPLY_HEAD_BYTES:
            raise ValueError("URL too long")
        if any(character < " " or "\x7f" <= character <= "\x9f" for character in text):
            raise ValueError("control character in the URL")  # urlsplit would leave some of them out
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https"):
            raise ValueError("not an http(s) URL")
        if not parts.hostname:
            raise ValueError("no host")
        query = f"?{_quoted(parts.query)}" if parts.query else ""
        user, at, _ = parts.netloc.rpartition("@")
        return cls(
            parts.scheme == "https",
            _ascii_host(parts.hostname),
            _port(parts.netloc) or (443 if parts.scheme == "https" else 80),
            (_quoted(parts.path) or "/") + query,
            f"Basic {b64encode(unquote_to_bytes(user if ':' in user else f'{user}:')).decode()}" if at else None,
        )

    @property
    def authority(self) -> str:
        """Host and port, as the `Host` header has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def _quoted(text: str) -> str:
    return quote(text, safe=_SAFE, errors="surrogateescape")


def _ascii_host(host: str) -> str:
    """Raises `ValueError` for what cannot be looked up."""
    if not host.isascii():
        import idna

        host = idna.encode(host, uts46=True).decode()
    if not all(0 < len(label) < 64 for label in host.removesuffix(".").split(".")):
        raise ValueError("invalid host name")
    return host


def _port(netloc: str) -> int | None:
    """Raises `ValueError` for what is none, in fewer words than urllib does."""
    _, colon, port = netloc.rpartition("@")[2].rpartition("]")[2].rpartition(":")
    if not colon or not port:
        return None
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"invalid port: {port!r}")
    return int(port)


class NoSuchProxy(ValueError):
    """The environment names a proxy that cannot be used; the hint says how to do without it."""

    def __init__(self, reason: str, host: str) -> None:
        super().__init__(reason)
        self.hint = f"NO_PROXY={host} goes without it"


def proxy_of(url: Url) -> Url | None:
    """The proxy that the environment has for a URL: `http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`.

    Raises `NoSuchProxy`, whose words do not show the address: it may have a password in it.
    """
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    named = proxies.get("https" if url.is_tls else "http") or proxies.get("all")
    if not named or proxy_bypass(f"{url.host}:{url.port}"):
        return None
    try:
        proxy = Url.parse(named if "://" in named else f"http://{named}")
    except ValueError:
        proxy = None
    if proxy is None or proxy.is_tls:
        raise NoSuchProxy("not an http:// address", url.host)
    return proxy


def connect_by(proxy: Url, url: Url, deadline: Deadline) -> tuple[socket.socket, str, dict[str, str]]:
    """A connection by a proxy, what a URL is asked for there, and the headers that the proxy gets. Raises `OSError`."""
    connection = connect(proxy.host, proxy.port, deadline)
    for_proxy = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
    if not url.is_tls:
        return connection, f"http://{url.authority}{url.target}", for_proxy
    there = f"{url.authority}:443" if url.port == 443 else url.authority
    answer = ask(connection, deadline, "CONNECT", there, {"Host": there, "Connection": "keep-alive", **for_proxy})
    if answer.status != 200:
        answer.close()
        raise OSError(f"its proxy answers {answer.status}")
    return encrypt(connection, url.host, deadline), url.target, {}


def connect(host: str, port: int, deadline: Deadline) -> socket.socket:
    """A connection to the first address of a host that takes one. Raises `OSError`, which `TimeoutError` is too."""
    return socket.create_connection((host, port), deadline.left())


def encrypt(plain: socket.socket, host: str, deadline: Deadline) -> ssl.SSLSocket:
    """TLS with a server whose certificate is for `host`. Closes the socket where that fails, with an `OSError`."""
    try:
        plain.settimeout(deadline.left())  # of the whole handshake, not of each read in it
        return _tls().wrap_socket(plain, server_hostname=host.rstrip("."))
    except BaseException:
        plain.close()
        raise


@cache
def _tls() -> ssl.SSLContext:
    if os.environ.get("SSL_CERT_FILE") or os.environ.get("SSL_CERT_DIR"):
        return ssl.create_default_context()
    import certifi

    return ssl.create_default_context(cafile=certifi.where())


def ask(
    connection: socket.socket,
    deadline: Deadline,
    method: str,
    target: str,
    headers: Mapping[str, str | bytes],
    body: bytes | None = None,
) -> Response:
    """Sends a request and returns the beginning of what comes back. The connection is the response's, or closed.

    Raises `OSError` or `TooLarge`.
    """
    common: dict[str, str | bytes] = {"User-Agent": "llava", "Accept-Encoding": "identity", "Connection": "close"}
    if body is not None:
        common["Content-Length"] = str(len(body))
    try:
        with suppress(ConnectionError):  # it may have refused before it had read everything
            _send(connection, deadline, _head(method, target, {**common, **headers}))
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
    left = memoryview(data)
    while left:
        connection.settimeout(deadline.left())
        left = left[connection.send(left[:_PIECE]) :]


class _Incoming(io.RawIOBase):
    """What a socket receives until the deadline, of limited size."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        self._connection, self._deadline = connection, deadline
        self.allow(limits.REPLY_HEAD_BYTES, "headers")

    def allow(self, most: int, what: str) -> None:
        """From here on: about so many bytes, for they are read in pieces."""
        self._most, self._what, self._left = most, what, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # which takes any buffer
        if self._left <= 0:
            raise TooLarge(f"{self._what} larger than {_size(self._most)}")
        self._connection.settimeout(self._deadline.left())
        count = self._connection.recv_into(buffer)
        self._left -= count
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """As of a socket, for `http.client`."""
        return io.BufferedReader(self)


class Response:
    """What a server sends back. All that reads raises `OSError`, for the deadline `TimeoutError`, or `TooLarge`."""

    def __init__(self, connection: socket.socket, deadline: Deadline, method: str = "GET") -> None:
        self.deadline = deadline
        self._connection, self._incoming = connection, _Incoming(connection, deadline)
        self._response = http.client.HTTPResponse(cast(socket.socket, self._incoming), method=method)
        with _http():
            self._response.begin()
        self.status = self._response.status

    def header(self, name: str) -> str | None:
        return self._response.getheader(name)

    def pieces(self, most: int) -> Iterator[bytes]:
        """The body as it comes, of at most so many bytes."""
        # A server may send little but marks around chunks, which are no part of the body.
        self._incoming.allow(2 * most + _PIECE, "marks around chunks")
        size, expected = 0, self._response.length
        while size != expected:
            with _http():
                piece = self._response.read1(_PIECE if expected is None else min(_PIECE, expected - size))
            if not piece:
                break
            size += len(piece)
            if size > most:
                raise TooLarge(f"larger than {_size(most)}")
            yield piece
        if expected and size < expected:
            raise Incomplete(_TOO_EARLY)

    def read(self, most: int) -> bytes:
        """The whole body, of at most so many bytes."""
        data = io.BytesIO()  # the pieces of a hostile server are one byte each
        for piece in self.pieces(most):
            data.write(piece)
        return data.getvalue()

    def lines(self, most: int, most_in_line: int) -> Iterator[bytes]:
        """The body's lines, with their ends."""
        line = bytearray()
        for piece in self.pieces(most):
            for part in piece.splitlines(keepends=True):
                line += part
                if len(line) > most_in_line:
                    raise TooLarge(f"a line longer than {_size(most_in_line)}")
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


_TOO_EARLY = "peer closed connection too early"


@contextmanager
def _http() -> Iterator[None]:
    """Translates what `http.client` raises."""
    try:
        yield
    except ConnectionError:  # one of them is an HTTPException as well
        raise
    except http.client.LineTooLong:
        raise TooLarge(f"headers larger than {_size(limits.REPLY_HEAD_BYTES)}") from None
    except http.client.IncompleteRead:
        raise Incomplete(_TOO_EARLY) from None
    except (http.client.HTTPException, ValueError):
        raise NotHttp("does not speak HTTP") from None
