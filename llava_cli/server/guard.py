"""Who may ask: hosts, origins and keys, checked before anything of a request is looked at."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections.abc import Collection
from typing import Any

from llava_cli.server.openai import Refusal

BODY_BYTES = 64_000_000
OWN_BODY_BYTES = 280_000_000
"""Of the user's own commands: two of the largest pictures that they open."""
BODY_SECONDS = 60.0
OWN_PATHS = "/llava"
"""What begins so is for the user's own commands alone."""


class Guard:
    """Around an ASGI app: refuses who may not ask. Our own socket is guarded by its file's mode.

    A page in a browser may be anybody's: it names its `Origin`, which has to be among `origins`, and where it got
    here by a name of its own making, that name is the `Host`, which has to be an address or among `hosts`.
    """

    def __init__(self, app: Any, key: str | None, hosts: Collection[str], origins: Collection[str]) -> None:
        self.app, self.key = app, key.encode() if key else None
        self.hosts, self.origins = {host.lower() for host in hosts}, set(origins)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        outside = not is_own_socket(scope)
        origin = headers.get("origin") if outside else None
        most = BODY_BYTES if outside else OWN_BODY_BYTES
        try:
            if outside:
                self._check(scope["path"], scope["method"], headers, origin)
            if int(headers.get("content-length") or 0) > most:
                raise Refusal(413, _at_most(most))
        except (Refusal, ValueError) as error:
            refusal = error if isinstance(error, Refusal) else Refusal(400, "malformed headers")
            more = [(name.lower().encode(), value.encode()) for name, value in refusal.headers().items()]
            await _answer(send, refusal.status, refusal.body(), [*more, *self._cors(origin)])
            return
        if origin and scope["method"] == "OPTIONS":
            await _answer(send, 204, None, self._cors(origin))
            return
        await self.app(scope, _Body(receive, most), self._sending(send, origin))

    def _check(self, path: str, method: str, headers: dict[str, str], origin: str | None) -> None:
        host = _name(headers.get("host", ""))
        if host not in self.hosts and not _is_address(host):
            raise Refusal(403, "this host is not served", code="host")
        if origin is not None and origin not in self.origins:
            raise Refusal(403, "this origin is not allowed", code="origin")
        if path.startswith(OWN_PATHS):
            raise Refusal(404, "Not Found")
        if self.key is None or path == "/health" or method == "OPTIONS":
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            raise Refusal(401, "a key is missing or wrong", code="invalid_api_key")

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None or origin not in self.origins:
            return []
        allowed = {
            "access-control-allow-origin": origin,
            "access-control-allow-headers": "authorization, content-type",
            "access-control-allow-methods": "GET, POST",
            "vary": "origin",
        }
        return [(name.encode(), value.encode("latin-1")) for name, value in allowed.items()]

    def _sending(self, send: Any, origin: str | None) -> Any:
        extra = self._cors(origin)

        async def told(message: dict[str, Any]) -> None:
            if extra and message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        return told


def is_own_socket(scope: Any) -> bool:
    """Whether a request came by the Unix socket, which is this user's alone."""
    return scope.get("server") is None or scope["server"][1] is None


class TooLarge(Exception):
    """A body that is larger, or slower to come, than a request's may be."""


class _Body:
    """A request's body, of limited size and within limited time."""

    def __init__(self, receive: Any, most: int) -> None:
        self._receive, self._most, self._size, self._whole = receive, most, 0, False
        self._until = asyncio.get_running_loop().time() + BODY_SECONDS

    async def __call__(self) -> Any:
        if self._whole:  # what comes now is that the client leaves
            return await self._receive()
        try:
            left = self._until - asyncio.get_running_loop().time()
            message = await asyncio.wait_for(self._receive(), max(left, 0))
        except asyncio.TimeoutError:
            raise TooLarge(f"a request takes at most {BODY_SECONDS:.0f} s to arrive") from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._size > self._most:
                raise TooLarge(_at_most(self._most))
        return message


def _at_most(size: int) -> str:
    return f"a request is at most {size // 1_000_000} MB"


async def _answer(send: Any, status: int, body: Any, headers: list[tuple[bytes, bytes]]) -> None:
    data = b"" if body is None else json.dumps(body).encode()
    kind = [] if body is None else [(b"content-type", b"application/json")]
    start = {"type": "http.response.start", "status": status, "headers": [*kind, *headers]}
    await send({**start, "headers": [*start["headers"], (b"content-length", str(len(data)).encode())]})  # type: ignore[misc]
    await send({"type": "http.response.body", "body": data})


def _name(host: str) -> str:
    """A Host header without its port."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
