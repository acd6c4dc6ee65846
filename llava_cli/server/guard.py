"""Who may ask: hosts, origins and keys, checked before anything of a request is looked at."""

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
from llava_cli.server.openai import Refusal
from llava_cli.untrusted_text import one_line

OWN_PATHS = "/llava"
"""What begins so is for the user's own commands alone."""
_SINGLE = ("authorization", "content-length", "content-type", "host", "origin", "transfer-encoding")
"""Headers of which two are a way to have one checked and the other obeyed."""
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^][:/@?#,\s]+))(?::[0-9]*)?", re.ASCII)


class Guard:
    """Around an ASGI app: refuses who may not ask. Our own socket is guarded by its file's mode and its peers' user.

    A page in a browser may be anybody's: it names its `Origin`, which has to be among `origins`, and where it got
    here by a name of its own making, that name is the `Host`, which has to be an address or among `hosts`.
    """

    def __init__(self, app: Any, key: str | None, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app, self.key = app, key.encode() if key else None
        self.hosts, self.origins = {host.lower() for host in hosts}, set(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope = {**scope, "path": _plain(scope["path"])}  # what is checked is what is routed
        outside, origin = not is_own_socket(scope), None
        exchange = _Exchange(receive, send)
        try:
            headers = _headers(scope)
            if outside:
                origin = headers.get("origin")
                self._check_page(headers.get("host", ""), origin)
                exchange.extra = [] if origin is None else _cors(origin)
                if origin is not None and scope["method"] == "OPTIONS":
                    await exchange.answer(204, None)
                    return
                self._check(scope["path"], headers)
            _check_length(headers, limits.BODY_BYTES if outside else limits.OWN_BODY_BYTES)
        except Refusal as refusal:
            await exchange.answer(refusal.status, refusal.body(), refusal.headers())
            return
        await self.app(scope, exchange.receive, exchange.send)

    def _check_page(self, host: str, origin: str | None) -> None:
        found = _HOST.fullmatch(host.lower())
        name = (found[1] or found[2]) if found else ""
        if name not in self.hosts and not _is_address(name):
            named = one_line(name) or "NAME"
            raise Refusal(403, f"this host is not served; llava serve --allow-host {named} allows it", code="host")
        if origin is not None and origin not in self.origins:
            named = one_line(origin)
            raise Refusal(403, f"this origin is not allowed; llava serve --allow-origin {named} does", code="origin")

    def _check(self, path: str, headers: dict[str, str]) -> None:
        if path.startswith(OWN_PATHS):
            raise Refusal(404, "Not Found")
        if self.key is None or path == "/health":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            raise Refusal(401, "a key is missing or wrong", code="invalid_api_key")


def is_own_socket(scope: Any) -> bool:
    """Whether a request came by the Unix socket, which is this user's alone: of TCP there is always a port."""
    return scope.get("server") is not None and scope["server"][1] is None


class _Exchange:
    """A request's two ends, with `extra` headers for whatever is answered.

    Where an answer closes the connection before the request has arrived, the rest of it is read and forgotten for a
    while: a client that is still sending when its connection is closed would not see the answer.
    """

    def __init__(self, receive: Any, send: Any) -> None:
        self._receive, self._send = receive, send
        self.extra: list[tuple[bytes, bytes]] = []
        self._has_arrived = self._closes = False

    async def receive(self) -> Any:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._has_arrived = True
        return message

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *self.extra]}
            self._closes = (b"connection", b"close") in message["headers"]
        elif self._closes and not self._has_arrived and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._rest(), limits.LINGER_SECONDS)
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        """An answer of our own, to a request that gets no further."""
        data = b"" if body is None else json.dumps(body).encode()
        named = {**({} if body is None else {"content-type": "application/json"}), **(headers or {})}
        named["content-length"] = str(len(data))
        fields = [(name.lower().encode(), value.encode()) for name, value in named.items()]
        await self.send({"type": "http.response.start", "status": status, "headers": fields})
        await self.send({"type": "http.response.body", "body": data})

    async def _rest(self) -> None:
        while not self._has_arrived:
            await self.receive()


def _headers(scope: Any) -> dict[str, str]:
    """A request's headers by their names in small letters. Raises `Refusal` for what can be read in two ways."""
    fields = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    if len(fields) > limits.HEAD_FIELDS:
        raise Refusal(431, f"a request has at most {limits.HEAD_FIELDS} headers", close=True)
    headers = dict(fields)
    names = [name for name, _ in fields if name in _SINGLE]
    twice = len(names) != len(set(names))
    coded = "transfer-encoding" in headers
    if twice or (coded and ("content-length" in headers or scope["http_version"] == "1.0")):
        raise Refusal(400, "headers that contradict each other", close=True)
    if not scope["path"].startswith("/"):
        raise Refusal(400, "the target of a request is a path", close=True)
    return headers


def _plain(path: str) -> str:
    """A path without the slashes that clients put together where they join addresses; a model's name keeps its own."""
    head, models, name = path.partition("/models/")
    head = re.sub("/{2,}", "/", head)
    return f"{head}{models}{name}" if name else (head + models).rstrip("/") or "/"


def _check_length(headers: dict[str, str], most: int) -> None:
    if int(headers.get("content-length") or 0) > most:  # digits, as h11 has seen to
        raise Refusal(413, f"the body: larger than {most // 1_000_000} MB", close=True)


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    allowed = {
        "access-control-allow-origin": origin,
        "access-control-allow-headers": "authorization, content-type, *",  # clients add ones of their own
        "access-control-allow-methods": "GET, POST",
        "vary": "origin",
    }
    return [(name.encode(), value.encode("latin-1")) for name, value in allowed.items()]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
