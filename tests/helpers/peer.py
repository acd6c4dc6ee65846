"""A server that speaks OpenAI's chat completions as it is told: well, badly, or not at all."""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
"""What a server does with a request."""


def say(status: int, body: Any, **headers: str) -> Reply:
    """A whole answer of this status."""

    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(data)

    return reply


def stream(*lines: str, cut: bool = False) -> Reply:
    """Server-sent events; with `cut` the connection breaks behind them."""

    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        data = "".join(f"{line}\n\n" for line in lines).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) + cut))
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = cut

    return reply


def delta(text: str | None, reason: str | None = None) -> str:
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": reason}]})


def answer(text: str, reason: str = "stop") -> Reply:
    """`text` as the request wants it, streamed or whole."""

    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": None}
        if asked.get("stream"):
            last = "data: " + json.dumps({"choices": [], "usage": usage})
            stream(": hello", delta(""), delta(text), delta(None, reason), last, "data: [DONE]")(handler, asked)
            return
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": reason}
        say(200, {"choices": [choice], "usage": usage})(handler, asked)

    return reply


def by_picture(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Answers at once, with what only this picture has."""
    (url,) = (part["image_url"]["url"] for part in asked["messages"][-1]["content"] if part["type"] == "image_url")
    answer(hashlib.sha256(url.encode()).hexdigest()[:16])(handler, asked)


class Held:
    """Answers as `by_picture`, the first `count` requests at once, and others as soon as they are let go."""

    def __init__(self, count: int) -> None:
        self._free, self._is_let_go = iter(range(count)), threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        if next(self._free, None) is None:
            self._is_let_go.wait()
        by_picture(handler, asked)

    def let_go(self) -> None:
        self._is_let_go.set()


def hang_up(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
    """Not a word."""
    handler.close_connection = True


@dataclass
class Peer:
    """A server that does as it is told, in turn, and with `usual` from then on."""

    url: str
    replies: list[Reply] = field(default_factory=list)
    usual: Reply = field(default_factory=lambda: answer("red"))
    models: Reply = field(default_factory=lambda: say(200, {"data": [{"id": "its-model"}]}))
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    """As requests name them: to a proxy with the host that they are for."""

    @property
    def pictures(self) -> list[tuple[str, bytes]]:
        """The type and the bytes of those that it was sent."""
        contents = [m["content"] for one in self.asked for m in one["messages"] if isinstance(m["content"], list)]
        urls = [part["image_url"]["url"] for content in contents for part in content if part["type"] == "image_url"]
        return [(url.partition(";")[0], base64.b64decode(url.partition(",")[2])) for url in urls]


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Peer]:
    """A peer at a port of its own."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            it.headers.append(dict(self.headers))
            it.targets.append(self.path)
            (it.models if urlsplit(self.path).path == "/v1/models" else say(404, {}))(self, {})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                it.asked.append(asked)
                it.headers.append(dict(self.headers))
                it.targets.append(self.path)
                reply = it.replies.pop(0) if it.replies else it.usual
            (reply if urlsplit(self.path).path == "/v1/chat/completions" else say(404, {}))(self, asked)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    it = Peer(f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield it
    finally:
        server.shutdown()
        server.server_close()
