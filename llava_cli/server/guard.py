"""Who may send requests: hosts, origins and API keys are checked before anything else of a request is read."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import re
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from llava_cli import limits
from llava_cli.server.api_error import ApiError
from llava_cli.untrusted_text import one_line

OWN_PATHS = "/llava"
"""The prefix of the paths that are for the user's own commands alone."""
_SINGLE = ("authorization", "content-length", "content-type", "host", "origin", "transfer-encoding")
"""Headers that may occur once: of two, one could be checked and the other obeyed (request smuggling)."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:/@?#,\s]+))(?::[0-9]*)?", re.ASCII)


class Guard:
    """ASGI middleware that refuses requests over TCP that may not be sent; the Unix socket is private already.

    Any web page can send requests to this machine. Browsers add the page's `Origin`, which has to be in `origins`; and
    a page that points a DNS name of its own here (DNS rebinding) sends that name as `Host`, which has to be an IP
    address or in `hosts`.
    """

    def __init__(self, app: Any, key: str | None, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app, self.key = app, key.encode() if key else None
        self.hosts, self.origins = {host.lower() for host in hosts}, set(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope = {**scope, "path": _normalized(scope["path"])}  # the path that is checked is the one that is routed
        is_tcp, origin = not is_own_socket(scope), None
        exchange = _Exchange(receive, send)
        try:
            headers = _headers(scope)
            if is_tcp:
                origin = headers.get("origin")
                self._check_page(headers.get("host", ""), origin)
                exchange.extra_headers = [] if origin is None else _cors(origin)
                if origin is not None and scope["method"] == "OPTIONS":
                    await exchange.respond(204, None)
                    return
                self._check_key(scope["path"], headers)
            _check_length(headers, limits.BODY_BYTES if is_tcp else limits.OWN_BODY_BYTES)
        except ApiError as error:
            await exchange.respond(error.status, error.body(), error.headers())
            return
        await self.app(scope, exchange.receive, exchange.send)

    def _check_page(self, host: str, origin: str | None) -> None:
        match = _HOST.fullmatch(host.lower())
        name = (match[1] or match[2]) if match else ""
        if name not in self.hosts and not _is_address(name):
            shown = one_line(name) or "NAME"
            raise ApiError(403, f"this host is not served; llava serve --allow-host {shown} allows it", code="host")
        if origin is not None and origin not in self.origins:
            shown = one_line(origin)
            raise ApiError(403, f"this origin is not allowed; llava serve --allow-origin {shown} does", code="origin")

    def _check_key(self, path: str, headers: dict[str, str]) -> None:
        if path.startswith(OWN_PATHS):
            raise ApiError(404, "Not Found")
        if self.key is None or path == "/health":
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), self.key):
            raise ApiError(401, "a key is missing or wrong", code="invalid_api_key")


def is_own_socket(scope: Any) -> bool:
    """Whether a request came over the Unix socket, which only this user can reach. TCP always has a port."""
    return scope.get("server") is not None and scope["server"][1] is None


class _Exchange:
    """ASGI's `receive` and `send` for one request, with `extra_headers` for its response.

    If the response closes the connection before the whole request has arrived, the rest is read and discarded for a
    while: a client whose connection is closed while it is still sending would not see the response.
    """

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self.extra_headers: list[tuple[bytes, bytes]] = []
        self._is_received = self._closes = False

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._is_received = True
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *self.extra_headers]}
            self._closes = (b"connection", b"close") in message["headers"]
        elif self._closes and not self._is_received and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._discard_rest(), limits.LINGER_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def respond(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """Sends a whole response, for a request that does not reach the app."""
        data = b"" if body is None else json.dumps(body).encode()
        headers = {**({} if body is None else {"content-type": "application/json"}), **(headers or {})}
        headers["content-length"] = str(len(data))
        fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": fields})
        await self.send({"type": "http.response.body", "body": data})

    async def _discard_rest(self) -> None:
        while not self._is_received:
            await self.receive()


def _headers(scope: Any) -> dict[str, str]:
    """The headers by their lower-case names. Raises `ApiError` if they are ambiguous."""
    fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    if len(fields) > limits.HEAD_FIELDS:
        raise ApiError(431, f"a request has at most {limits.HEAD_FIELDS} headers", close=True)
    headers = dict(fields)
    names = [name for name, _ in fields if name in _SINGLE]
    has_duplicates = len(names) != len(set(names))
    is_encoded = "transfer-encoding" in headers
    if has_duplicates or (is_encoded and ("content-length" in headers or scope["http_version"] == "1.0")):
        raise ApiError(400, "headers that contradict each other", close=True)
    if not scope["path"].startswith("/"):
        raise ApiError(400, "the target of a request is a path", close=True)
    return headers


def _normalized(path: str) -> str:
    """The path without repeated or trailing slashes, except within a model's name."""
    head, models, name = path.partition("/models/")
    head = re.sub("/{2,}", "/", head)
    return f"{head}{models}{name}" if name else (head + models).rstrip("/") or "/"


def _check_length(headers: dict[str, str], limit: int) -> None:
    if int(headers.get("content-length") or 0) > limit:  # h11 accepts only digits
        raise ApiError(413, f"the body: larger than {limit // 1_000_000} MB", close=True)


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    headers = {
        "access-control-allow-origin": origin,
        "access-control-allow-headers": "authorization, content-type, *",  # clients add headers of their own
        "access-control-allow-methods": "GET, POST",
        "vary": "origin",
    }
    return [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
