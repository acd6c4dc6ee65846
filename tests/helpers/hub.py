"""A Hugging Face Hub of one test's own: what `llava models pull` asks of the real one, served from folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
BIG = 1_000_000
"""Larger files are stored as the real Hub stores them: named by SHA-256, on another host."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    begins_at: int
    """The first byte that was asked for."""
    token: str | None
    sent: int
    """How many bytes of an answer's body went out."""


@dataclass
class Hub:
    """Serves `repos`; the other fields make it misbehave."""

    repos: dict[str, Path]
    commit: str = COMMIT
    gated: bool = False
    breaks_after: int | None = None
    """The connection that has sent so much of one big file breaks, and the Hub is down from then on."""
    hiccups_after: int | None = None
    """The same, once, and then all is well."""
    hangs_after: int | None = None
    """So much of a big file is sent, and then nothing until `go_on`."""
    knows_ranges: bool = True
    down: bool = False
    claims: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing gives instead of the true ones."""
    tells_hashes: bool = True
    garbles: bool = False
    """Big files arrive with other bytes than they have."""
    page: bytes = b""
    """Answers everything, as the log-in page of a hotel's network does."""
    lies: Callable[[dict[str, Any]], Any] | None = None
    """What the listing is made into."""
    endless: tuple[str, ...] = ()
    """Paths that end like one of these are answered without an end, with the `endless_status`."""
    endless_status: int = 200
    packs: bool = False
    """Everything is said to be packed."""
    headers: dict[str, str] = field(default_factory=dict)
    """In the place of those of a file."""
    requests: list[Request] = field(default_factory=list)
    go_on: Event = field(default_factory=Event)
    url: str = ""

    def fetched(self, file: str) -> list[Request]:
        """The downloads of a file, in order."""
        return [r for r in self.requests if r.sent and r.path.endswith("/" + file)]

    def files(self) -> set[str]:
        """The names of all files of which anything was downloaded."""
        return {r.path.rsplit("/", 1)[1] for r in self.requests if r.sent and not r.path.startswith("/api/")}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Runs it on this machine, `hub.url` its address, until the block ends."""
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away, as some tests want."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.endswith(self.hub.endless or "\0"):
            self._go_on_for_ever()
            return
        if self.hub.page:
            self._send(200, self.hub.page, {"Content-Type": "text/html"})
            return
        if self.hub.down:
            self._error(503, "", "Service Unavailable")
            return
        for repo, folder in self.hub.repos.items():
            if path in (f"/api/models/{repo}", f"/api/models/{repo}/revision/main"):
                self._send(200, json.dumps(self._info(repo, folder)).encode(), {"Content-Type": "application/json"})
                return
            for prefix in (f"/{repo}/resolve/main/", f"/{repo}/resolve/{self.hub.commit}/"):
                if path.startswith(prefix):
                    self._file(repo, folder / path.removeprefix(prefix))
                    return
            if path.startswith(f"/cdn/{repo}/"):
                self._body(folder / path.removeprefix(f"/cdn/{repo}/"), {})
                return
        self._error(404, "RepoNotFound", "Repository not found")

    do_HEAD = do_GET  # noqa: N815  http.server's name for it

    def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002  http.server's name for it

    def _go_on_for_ever(self) -> None:
        """As long as somebody reads; `sent` of the request says how much that was."""
        self.send_response(self.hub.endless_status)
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection, sent = True, 0
        try:
            while self.command != "HEAD":
                sent += self.wfile.write(b"[" * 65_536)
        finally:
            self.hub.requests.append(Request(self.command, self.path, 0, None, sent))

    def _info(self, repo: str, folder: Path) -> Any:
        siblings = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = path.relative_to(folder).as_posix()
            size = self.hub.claims.get(name, path.stat().st_size)
            sibling = {"rfilename": name, "size": size, "blobId": hub_hash(path)}
            if path.stat().st_size > BIG:
                sibling["lfs"] = {"size": size, "sha256": _sha256(path), "pointerSize": 134}
            siblings.append(sibling if self.hub.tells_hashes else {"rfilename": name})
        info = {"id": repo, "modelId": repo, "sha": self.hub.commit, "siblings": siblings, "gated": self.hub.gated}
        return self.hub.lies(info) if self.hub.lies else info

    def _file(self, repo: str, path: Path) -> None:
        if self.hub.gated:
            self._error(403, "GatedRepo", f"Access to model {repo} is restricted")
        elif not path.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
        elif path.stat().st_size > BIG:
            elsewhere = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{repo}/{path.name}"
            linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{_sha256(path)}"'}
            self._send(302, b"", {"Location": elsewhere, "X-Repo-Commit": self.hub.commit, **linked})
        else:
            self._body(path, {"ETag": f'"{hub_hash(path)}"', "X-Repo-Commit": self.hub.commit})

    def _body(self, path: Path, headers: dict[str, str]) -> None:
        data, status = path.read_bytes(), 200
        if self.hub.garbles and len(data) > BIG:
            data = data[::-1]
        whole, begin = len(data), 0
        if self.hub.knows_ranges and (wanted := self.headers.get("Range")):
            begin, status = int(wanted.removeprefix("bytes=").rstrip("-")), 206
            headers = {**headers, "Content-Range": f"bytes {begin}-{whole - 1}/{whole}"}
        self._send(status, data[begin:], headers, may_break=whole > BIG)

    def _error(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str], may_break: bool = False) -> None:
        self.send_response(status)
        packed = {"Content-Encoding": "gzip"} if self.hub.packs else {}
        for name, value in {**headers, **self.hub.headers, **packed, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        hub = self.hub
        cut = hub.breaks_after or hub.hiccups_after or hub.hangs_after if may_break else None
        sent = b"" if self.command == "HEAD" or status >= 300 else body[:cut]
        begins = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        token = self.headers.get("Authorization")
        hub.requests.append(Request(self.command, unquote(urlsplit(self.path).path), begins, token, len(sent)))
        self.wfile.write(sent)
        if cut is None or not sent:
            return
        self.wfile.flush()
        if hub.hangs_after:
            hub.go_on.wait(60)
        hub.down = bool(hub.breaks_after)
        hub.hiccups_after = None
        self.close_connection = True


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def hub_hash(path: Path) -> str:
    """The name that a small file has in git."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def shard(folder: Path) -> None:
    """Turns a checkpoint's weights into three shards and their index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {tensor: names[i % 3] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({t: tensors[t] for t, place in places.items() if place == name}, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
