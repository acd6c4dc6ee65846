"""A Hugging Face Hub with one data set: what its file system asks for, served from memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"


@contextmanager
def serving(repo: str, files: dict[str, bytes]) -> Iterator[str]:
    """Runs it on this machine until the block ends; gives its URL."""
    handler = type("Handler", (_Handler,), {"repo": repo, "files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    repo: str
    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, trees = f"/api/datasets/{self.repo}", ("/tree/main", f"/tree/{COMMIT}")
        tree = next((path.removeprefix(api + tree) for tree in trees if path.startswith(api + tree)), None)
        name = path.removeprefix(f"/datasets/{self.repo}/resolve/").partition("/")[2]
        if tree is not None:
            self._send(json.dumps(self._listed(tree.strip("/"))).encode())
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            self._send(json.dumps({"id": self.repo, "sha": COMMIT, "siblings": []}).encode())
        elif name in self.files:
            self._file(self.files[name])
        else:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound" if "/resolve/" in path else "RepoNotFound"})

    do_HEAD = do_GET  # noqa: N815  http.server's name for it

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        wanted = unquote(body)
        found = [self._entry(name) for name in self.files if f"paths={name}" in wanted or f'"{name}"' in wanted]
        self._send(json.dumps(found).encode())

    def _listed(self, folder: str) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        inside = [name for name in self.files if name.startswith(start)]
        folders = {start + name[len(start) :].split("/")[0] for name in inside if "/" in name[len(start) :]}
        entries = [{"type": "directory", "path": path, "oid": COMMIT} for path in sorted(folders)]
        return entries + [self._entry(name) for name in inside if "/" not in name[len(start) :]]

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": f"{hash(self.files[name]):x}"}

    def _file(self, data: bytes) -> None:
        begin, end, status = 0, len(data), 200
        if wanted := self.headers.get("Range", "").removeprefix("bytes="):
            first, last = wanted.split("-")
            begin, end, status = int(first), min(int(last or len(data)) + 1, len(data)), 206
        headers = {"ETag": f'"{hash(data)}"', "X-Repo-Commit": COMMIT}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        self._send(data[begin:end], status, headers)

    def _send(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass
