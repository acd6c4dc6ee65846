"""A server's connections, with a stranger at the other end."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from llava_cli.server import connection as module
from llava_cli.server.connection import Connection

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def told(*pieces: bytes) -> bytes:
    """All that is said to a client that says no more than `pieces`, until the connection is closed."""
    loop, config = asyncio.get_running_loop(), uvicorn.Config(app, lifespan="off", log_config=None)
    connection = Connection(config, ServerState(), {})
    server = await loop.create_server(lambda: connection, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        answer = b""
        for piece in pieces:
            writer.write(piece)
            if piece.endswith(b"\r\n\r\n"):
                answer += await reader.readuntil(b"ok")
                assert connection._late is None  # nothing hurries an answer, or the next question
        answer += await reader.read()
        writer.close()
    return answer


@pytest.mark.parametrize("pieces", [(), (HEAD,), (HEAD + b"\r\n", HEAD), (HEAD + b"\r\n", HEAD + b"\r\n", b"G")])
def test_half_a_head_is_not_waited_for(pieces: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it the first or a later one; those before it are answered."""
    monkeypatch.setattr(module, "HEAD_SECONDS", 0.5)
    answer = asyncio.run(asyncio.wait_for(told(*pieces), 30))
    assert answer.count(b"HTTP/1.1 200") == sum(piece.endswith(b"\r\n\r\n") for piece in pieces)


def test_what_is_no_http_is_refused_in_openais_shape() -> None:
    head, _, body = asyncio.run(asyncio.wait_for(told(b"hello\r\n\r\n\0"), 30)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
