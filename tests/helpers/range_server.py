"""Files over HTTP, with ranges: what a server of archives does, and what it may do wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread


@dataclass
class Files:
    """Serves `files`; the other fields make it misbehave."""

    files: dict[str, bytes] = field(default_factory=dict)
    knows_ranges: bool = True
    says_length: bool = True
    breaks_after: list[int] = field(default_factory=list)
    """After how many bytes the next connections break."""
    statuses: list[int] = field(default_factory=list)
    """Of the next answers, which have no body."""
    moved: dict[str, str] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    """The path and the range of each."""
    url: str = ""


@contextmanager
def serving(files: Files) -> Iterator[Files]:
    """Runs it on this machine, `files.url` its address, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"files": files}))
    server.daemon_threads = True
    files.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    files: Files

    def do_GET(self) -> None:
        files, path = self.files, self.path.partition("?")[0]
        wanted = self.headers.get("Range", "")
        files.requests.append((self.path, wanted))
        data = files.files.get(path)
        if files.statuses:
            self._answer(files.statuses.pop(0), b"")
        elif path in files.moved:
            self._answer(302, b"", Location=files.moved[path])
        elif data is None:
            self._answer(404, b"")
        elif files.knows_ranges and wanted:
            begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin >= len(data):
                self._answer(416, b"", Content_Range=f"bytes */{len(data)}")
            else:
                rest = f"bytes {begin}-{len(data) - 1}/{len(data)}"
                self._answer(206, data[begin:], ETag=f'"{hash(data)}"', Content_Range=rest)
        else:
            self._answer(200, data, ETag=f'"{hash(data)}"')

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        if self.files.says_length:
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        cut = self.files.breaks_after.pop(0) if body and self.files.breaks_after else None
        self.wfile.write(body[:cut])
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass
