"""`llava serve` as processes of their own, and in a thread of the test's, where limits can be other ones."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openai

    from llava_cli.engine.local import LocalEngine


@dataclass
class Endpoint:
    """Where a server is reached."""

    socket: Path
    port: int

    def client(self, **options: Any) -> openai.OpenAI:
        import openai

        return openai.OpenAI(
            base_url=f"http://127.0.0.1:{self.port}/v1", **{"api_key": "none", "max_retries": 0, **options}
        )

    def ask(
        self, path: str, method: str = "GET", body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, None if body is None else json.dumps(body), names)
        answer = connection.getresponse()
        told = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        connection.close()
        return told

    def until_running(self, count: int) -> None:
        """Asks until so many requests are in hand."""
        for _ in range(5000):
            if self.metric("llava_requests_running") == count:
                return
        raise AssertionError(self.metric("llava_requests_running"))

    def metric(self, name: str) -> float:
        lines = self.ask("/metrics")[2].decode().splitlines()
        return float(next((line.rpartition(" ")[2] for line in lines if line.startswith(name)), "0"))


@dataclass
class Server(Endpoint):
    """A `llava serve` of its own."""

    process: subprocess.Popen[str]


Serve = Callable[..., Server]
"""`serve(*words, **variables)`: one more, with its socket in the test's home."""


def begin(folder: Path, *words: str | Path, **variables: str) -> Server:
    path = folder / "server.sock"
    environment = {**os.environ, "LLAVA_SOCKET": str(path), "HOME": str(folder), **variables}
    command = [sys.executable, "-m", "llava_cli", "serve", "--port", "0", "-p", "fp32", *map(str, words)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr
    line = process.stderr.readline()
    if " on http" not in line:
        raise AssertionError(line + process.stderr.read())
    return Server(path, int(line.rpartition("/v1")[0].rpartition(":")[2]), process)


def end(server: Server) -> int:
    server.process.terminate()
    server.process.communicate(timeout=60)
    return server.process.returncode


@contextmanager
def in_thread(
    engine: LocalEngine, folder: Path, key: str | None = None, remote: bool = False, origins: tuple[str, ...] = ()
) -> Iterator[Endpoint]:
    """All of a server but its process and its model's loading, at a TCP port and at a Unix socket."""
    import uvicorn
    from uvicorn.server import ServerState

    from llava_cli.server.app import make_app
    from llava_cli.server.connection import Connection
    from llava_cli.server.generation import GenerationService
    from llava_cli.server.guard import Guard
    from llava_cli.server.service import Service
    from llava_cli.settings import Settings

    generation, path = GenerationService(engine), folder / "thread.sock"
    loops, ports = list[asyncio.AbstractEventLoop](), list[int]()
    begun, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        service = Service(generation, Settings(), 64, remote)
        app = Guard(make_app(service, dict), key, {"localhost"}, origins)
        config = uvicorn.Config(app, ws="none", lifespan="off", log_config=None, proxy_headers=False)
        state = ServerState()
        tcp = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
        own = await loop.create_unix_server(lambda: Connection(config, state, {}), path)
        loops.append(loop)
        ports.append(tcp.sockets[0].getsockname()[1])
        begun.set()
        await over.wait()
        for one in [tcp, own]:
            one.close()
        for connection in list(state.connections):
            connection.transport.abort()
        service.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert begun.wait(60)
    try:
        yield Endpoint(path, ports[0])
    finally:
        loops[0].call_soon_threadsafe(over.set)
        thread.join(60)
        generation.close()


def connected(server: Endpoint, data: bytes = b"", own: bool = False) -> socket.socket:
    """A connection that has said so much."""
    if own:
        one = socket.socket(socket.AF_UNIX)
        one.settimeout(60)
        one.connect(str(server.socket))
    else:
        one = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    one.sendall(data)
    return one


def response(connection: socket.socket, method: str = "GET") -> tuple[int, dict[str, str], Any]:
    """What a connection is answered: status, headers and, where it is JSON, the body."""
    answer = http.client.HTTPResponse(connection, method=method)
    answer.begin()
    body = answer.read()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    is_json = body and headers.get("content-type") == "application/json"
    return answer.status, headers, json.loads(body) if is_json else body


def post(body: bytes, *headers: str, path: str = "/v1/chat/completions", length: int | None = None) -> bytes:
    """A request, with the `length` that it claims to have."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body) if length is None else length}", "", ""]).encode() + body
