"""A server's connections, with a stranger at the other end."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn
from helpers.command import Run
from helpers.servers import Endpoint, connected, in_thread, response
from helpers.tables import for_each
from uvicorn.server import ServerState

from llava_cli import limits, load
from llava_cli.server.address import Address
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
                assert connection._head_timer is None  # no deadline for an answer, or before the next question
        answer += await reader.read()
        writer.close()
    return answer


@for_each("pieces", [(), (HEAD,), (HEAD + b"\r\n", HEAD), (HEAD + b"\r\n", HEAD + b"\r\n", b"G")])
def test_half_a_head_is_not_waited_for(pieces: tuple[bytes, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it the first or a later one; those before it are answered."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.5)
    answer = asyncio.run(asyncio.wait_for(told(*pieces), 30))
    assert answer.count(b"HTTP/1.1 200") == sum(piece.endswith(b"\r\n\r\n") for piece in pieces)


def test_what_is_no_http_is_refused_in_openais_shape() -> None:
    head, _, body = asyncio.run(asyncio.wait_for(told(b"hello\r\n\r\n\0"), 30)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """One with a key, for a page of one origin, reached by the name localhost."""
    engine = load("builtin", precision="fp32", device="cpu")
    with in_thread(engine, tmp_path_factory.mktemp("server"), key="secret", origins=(MINE,)) as running:
        yield running


MINE = "https://mine.example"
KEY = "Authorization: Bearer secret"
MODELS = "GET /v1/models HTTP/1.1"


def status(server: Endpoint, *lines: str, own: bool = False) -> int:
    """What a request of these lines is answered."""
    with closing(connected(server, "\r\n".join([*lines, "", ""]).encode("latin-1"), own=own)) as connection:
        return response(connection, lines[0].partition(" ")[0])[0]


@for_each(
    "lines",
    [
        ("Host: evil.example", "Host: localhost", KEY),
        ("Host: localhost", "Authorization: Bearer wrong", KEY),
        ("Host: localhost", KEY, "authorization: Bearer wrong"),
        ("Host: localhost", KEY, "Origin: https://evil.example", f"Origin: {MINE}"),
        ("Host: localhost", KEY, "Content-Length: 0", "Content-Length: 5"),
        ("Host: localhost", KEY, "Content-Length: 0", "Transfer-Encoding: chunked"),
        ("Host: localhost", KEY, "Content-Type: text/plain", "Content-Type: application/json"),
        ("Host: localhost", KEY, "Content-Length: +5"),
        ("Host: localhost", KEY, "Content-Length: 5, 6"),
        ("Host: localhost", KEY, " Host: evil.example"),
    ],
)
def test_headers_that_can_be_read_in_two_ways(lines: tuple[str, ...], server: Endpoint) -> None:
    assert status(server, MODELS, "Host: localhost", KEY) == 200
    assert status(server, MODELS, *lines) in (400, 401)


def test_an_old_protocol_has_no_chunks_and_a_host_too(server: Endpoint) -> None:
    old = MODELS.replace("1.1", "1.0")
    assert status(server, old, "Host: localhost", KEY, "Transfer-Encoding: chunked") == 400
    assert status(server, old, KEY) == 403
    assert status(server, old, "Host: localhost", KEY) == 200


TARGETS = """
/llava /llava/ //llava /%6clava /llava%2fprompt /llava%3f /./llava /v1/../llava /LLAVA /llava?a /llava;a /%2e/llava
/health/../llava /v1/models/../../llava /llava%00 /llava/prompt http://localhost/llava http://localhost localhost:80 *
"""


@for_each("target", TARGETS.split())
def test_no_way_leads_to_what_is_for_our_own_commands(target: str, server: Endpoint) -> None:
    for method in ("GET", "HEAD", "POST", "OPTIONS"):
        assert status(server, f"{method} {target} HTTP/1.1", "Host: localhost", KEY) in (400, 404, 405)
    assert status(server, "GET /llava HTTP/1.1", "Host: localhost", own=True) == 200


@for_each(
    ("host", "is_served"),
    [
        ("localhost", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:8000", True),
        ("[::1]:8000", True),
        ("localhost:", True),
        ("", False),
        ("evil.example", False),
        ("localhost@evil.example", False),
        ("evil.example@localhost", False),
        ("localhost:80:80", False),
        ("localhost:80.evil.example", False),
        ("localhost, evil.example", False),
        ("[::1].evil.example", False),
        ("[::1", False),
        ("[localhost]", False),
        ("localhost/evil.example", False),
    ],
)
def test_names_of_the_host(host: str, is_served: bool, server: Endpoint) -> None:
    assert status(server, MODELS, f"Host: {host}", KEY) == (200 if is_served else 403)


@for_each(
    ("lines", "expected"),
    [
        (("OPTIONS /v1/models HTTP/1.1", f"Origin: {MINE}"), 204),
        (("OPTIONS /v1/models HTTP/1.1",), 401),
        (("OPTIONS /v1/models HTTP/1.1", "Origin: null"), 403),
        (("OPTIONS /v1/models HTTP/1.1", "Origin:"), 403),
        ((MODELS, f"Origin: {MINE}"), 401),
        ((MODELS, "Origin: null", KEY), 403),
        ((MODELS, f"Origin: {MINE}.evil.example", KEY), 403),
        ((MODELS, f"Origin: {MINE}", "Authorization: bearer  secret "), 200),
        (("GET /health HTTP/1.1", "Origin: null"), 403),
        (("GET /health HTTP/1.1",), 200),
        (("GET /health/ HTTP/1.1",), 200),
        (("GET /health%2f.. HTTP/1.1",), 401),
        (("HEAD /v1/models HTTP/1.1",), 401),
    ],
)
def test_a_key_is_asked_for(lines: tuple[str, ...], expected: int, server: Endpoint) -> None:
    assert status(server, *lines, "Host: localhost") == expected


def test_nothing_is_upgraded(server: Endpoint) -> None:
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: YQ==")
    assert status(server, "GET /v1/models HTTP/1.1", "Host: localhost", *upgrade) == 401
    assert status(server, "GET /llava HTTP/1.1", "Host: localhost", KEY, *upgrade) == 404


def test_a_pipeline_is_checked_request_by_request(server: Endpoint) -> None:
    first = f"{MODELS}\r\nHost: localhost\r\n{KEY}\r\n\r\n"
    last = first.replace(KEY, f"{KEY}\r\nConnection: close")
    with closing(connected(server, (first + first.replace("secret", "wrong") + last).encode())) as connection:
        answers = connection.makefile("rb").read()
    assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"401", b"200"]


@for_each("origin", ["*", "null", "mine.example", f"{MINE}/", f"{MINE}/page", "https://"])
def test_origins_that_no_page_has_of_its_own(origin: str, run: Run) -> None:
    result = run("serve", "--allow-origin", origin)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"llava: --allow-origin {origin}: ")


def test_small_pieces_are_sent_at_once() -> None:
    """asyncio sees to that where a socket has its protocol; else an answer may wait for 40 ms."""
    with Address(port=0).listen() as listener, closing(socket.create_connection(listener.getsockname())):
        assert listener.accept()[0].proto == socket.IPPROTO_TCP
