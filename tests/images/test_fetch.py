"""Pictures by URL, from real servers on this machine: friendly, broken, slow, endless and devious ones."""

from __future__ import annotations

import gzip
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from helpers.command import Run
from helpers.tables import for_each
from helpers.tls import of_a_server
from PIL import Image

from llava_cli import bounded_http, limits
from llava_cli.errors import BadImage, InputMissing, LlavaError
from llava_cli.images import fetch as module
from llava_cli.images.fetch import fetch
from llava_cli.images.reader import open_picture

QUESTION = "what is this?"


def png() -> bytes:
    Image.new("RGB", (8, 6), "red").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


PNG = png()


class Handler(BaseHTTPRequestHandler):
    """Calls the server's function for a path and keeps the requests that came."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers.items())))
        self.server.pages[self.path.partition("?")[0]](self)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.send(body)

    def send(self, data: bytes) -> bool:
        """Whether the other side is still there."""
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            return False
        return True


Page = Callable[[Handler], object]


class Server(ThreadingHTTPServer):
    """A server with pages of the test's choice; `.stopped` wakes those that hang."""

    daemon_threads = True

    def __init__(self, address: str) -> None:
        super().__init__((address, 0), Handler)
        self.stopped = threading.Event()
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.base = f"http://{address}:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def page(self, path: str, page: Page) -> str:
        self.pages[path] = page
        return self.base + path

    def redirect(self, path: str, location: str, status: int = 302) -> str:
        return self.page(path, lambda h: h.answer(status, location=location))

    def picture(self, path: str = "/img.png") -> str:
        return self.page(path, lambda h: h.answer(200, PNG, content_length=str(len(PNG))))

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.requests]

    def stop(self) -> None:
        self.stopped.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.1")
    yield server
    server.stop()


@pytest.fixture
def other() -> Iterator[Server]:
    """A second host: another loopback address."""
    server = Server("127.0.0.2")
    yield server
    server.stop()


def assert_refused(run: Run, url: str, reason: str, code: int = 66, hint: str = "") -> None:
    """With `hint` after how the URL becomes a file."""
    result = run("ask", url, QUESTION)
    hints = [f"  curl -Lo FILE {url}; {hint}"] if hint else []
    assert result.stderr.splitlines() == [f"llava: {url}: {reason}", *hints]
    assert result.exit_code == code
    assert result.stdout == ""


# What comes back.


def test_a_picture(server: Server) -> None:
    url = server.picture()
    assert fetch(url) == PNG
    picture = open_picture(url)
    assert (picture.name, picture.image.size, picture.image.getpixel((0, 0))) == (url, (8, 6), (255, 0, 0))


def test_the_command_answers_about_a_url(server: Server, run: Run) -> None:
    result = run("ask", server.picture(), QUESTION, "--max-tokens", "1", "-q")
    assert (result.exit_code, result.stderr) == (0, "")


@for_each("kind", ["text/html", "application/octet-stream", "image/svg+xml", ""], own=(server,))
def test_the_content_type_is_ignored(kind: str, server: Server) -> None:
    url = server.page("/page.html", lambda h: h.answer(200, PNG, content_type=kind))
    assert open_picture(url).image.size == (8, 6)


def test_a_body_without_length_or_in_chunks(server: Server) -> None:
    def chunked(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        body = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in (PNG[:7], PNG[7:])) + b"0\r\n\r\n"
        handler.answer(200, body, transfer_encoding="chunked")

    assert fetch(server.page("/plain", lambda h: h.answer(200, PNG))) == PNG
    assert fetch(server.page("/chunked", chunked)) == PNG


@for_each("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 418, 429, 500, 503], own=(server,))
def test_any_status_but_200_is_refused(status: int, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(status))
    assert_refused(run, url, f"the server answered {status}")


@for_each("status", [301, 302, 303, 307, 308], own=(server,))
def test_a_redirect_to_nowhere_is_refused(status: int, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(status))
    assert_refused(run, url, f"the server answered {status}")


@for_each(
    ("body", "reason", "hint"),
    [
        (b"", "empty file", ""),
        (b"hello", "not an image", ""),
        (b"<html>please log in</html>", "a web page, not an image", "less FILE shows what came in its place"),
        (b"<svg/>", "SVG is not a supported image", "rsvg-convert -o FILE.png FILE"),
        (PNG[:30], "truncated or damaged", ""),
    ],
    own=(server,),
)
def test_what_is_no_picture_is_refused(body: bytes, reason: str, hint: str, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(200, body, content_type="image/png"))
    assert_refused(run, url, reason, 65, hint)


def test_a_body_that_ends_early_is_refused(server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(200, PNG, content_length="999"))
    result = run("ask", url, QUESTION)
    assert result.exit_code == 66
    assert result.stderr.startswith(f"llava: {url}: peer closed connection")
    assert len(result.stderr.splitlines()) == 1


def test_what_is_no_http_is_refused(server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.send(b"\x1b[2J\r\n220 ftp ready\r\n"))
    result = run("ask", url, QUESTION)
    assert result.exit_code == 66
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.removesuffix("\n").isprintable()


def test_nobody_there(run: Run) -> None:
    with socket.socket() as taken:  # bound and not listening: nobody else gets this port meanwhile
        taken.bind(("127.0.0.1", 0))
        assert_refused(run, f"http://127.0.0.1:{taken.getsockname()[1]}/img.png", "connection refused")


def test_no_such_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object, **options: object) -> list[object]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(module.socket, "getaddrinfo", unknown)
    assert_refused(run, "http://nobody.example/img.png", "name or service not known")


def test_over_tls(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From who can show that the URL's host is what he is: at the address that was judged, and by the URL's name."""
    context, file = of_a_server(tmp_path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.picture()
    url = f"https://localhost:{server.server_port}/img.png"
    for trusted, hosts in ((str(file), {"localhost", "127.0.0.1"}), ("", set())):
        monkeypatch.setenv("SSL_CERT_FILE", trusted)
        bounded_http.tls_context.cache_clear()
        for host in ("localhost", "127.0.0.1", "other.example", "127.1"):
            monkeypatch.setattr(module, "_resolve", lambda host, port: "127.0.0.1")
            if host in hosts:
                assert fetch(url.replace("localhost", host)) == PNG
            else:
                with pytest.raises(InputMissing, match="certificate verify failed"):
                    fetch(url.replace("localhost", host))
    bounded_http.tls_context.cache_clear()


def test_tls_that_is_none(server: Server, run: Run) -> None:
    url = server.picture().replace("http:", "https:")
    result = run("ask", url, QUESTION)
    (line,) = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (66, "")
    assert line.startswith(f"llava: {url}: ")
    assert line.isprintable()


# Size.


@pytest.mark.parametrize("headers", [{}, {"content_length": "99999999999"}, {"content_length": "20000001"}])
def test_too_large_is_refused_while_it_comes(headers: dict[str, str], server: Server, run: Run) -> None:
    sent, finished = [], threading.Event()

    def endless(handler: Handler) -> None:
        handler.answer(200, PNG, **headers)
        while not server.stopped.is_set() and handler.send(bytes(65536)):
            sent.append(65536)
        finished.set()

    assert_refused(run, server.page("/img.png", endless), "larger than 20 MB", 65)
    assert finished.wait(60)
    assert sum(sent) < 200_000_000  # what is over 20 MB was on its way


def test_the_limit_itself_is_allowed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FETCH_BYTES", 1_000_000)
    url = server.page("/img.png", lambda h: h.answer(200, bytes(int(h.path.partition("?")[2]))))
    assert len(fetch(url + "?1000000")) == 1_000_000
    with pytest.raises(BadImage, match="larger than 1 MB"):
        fetch(url + "?1000001")


def test_a_compressed_answer_is_not_unpacked(server: Server, run: Run) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    url = server.page("/img.png", lambda h: h.answer(200, bomb, content_encoding="gzip"))
    assert_refused(run, url, "a gzip archive, not an image", 65, "gunzip -k FILE, or tar -xf FILE")
    assert server.requests[0][1]["Accept-Encoding"] == "identity"


def many_headers(handler: Handler) -> None:
    handler.send(b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(200)) + b"\r\n")


def one_long_header(handler: Handler) -> None:
    handler.send(b"HTTP/1.1 200 OK\r\nx: ")
    while not handler.server.stopped.is_set() and handler.send(b"y" * 4096):
        pass


def large_headers(handler: Handler) -> None:
    handler.send(b"HTTP/1.1 200 OK\r\n" + b"".join(b"x-%d: " % n + b"y" * 8000 + b"\r\n" for n in range(90)))


def interim_answers(handler: Handler) -> None:
    while not handler.server.stopped.is_set() and handler.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 100):
        pass


@for_each("page", [many_headers, one_long_header, large_headers, interim_answers], own=(server,))
def test_a_large_head_is_refused(page: Page, server: Server, run: Run) -> None:
    url = server.page("/img.png", page)
    result = run("ask", url, QUESTION)
    assert result.exit_code in (65, 66)
    (line,) = result.stderr.splitlines()
    large = f"llava: {url}: headers larger than {limits.REPLY_HEAD_BYTES:,} bytes"
    assert line in (large, f"llava: {url}: does not speak HTTP")


@pytest.mark.parametrize("more", [b"1;" + b"x" * 60_000 + b"\r\ny\r\n", b"0\r\n" + b"x: y\r\n" * 10_000])
def test_marks_around_chunks_are_bounded_too(more: bytes, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body of a few bytes, with extensions of its chunks or trailers without end."""
    monkeypatch.setattr(limits, "FETCH_BYTES", 1_000_000)

    def page(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.answer(200, transfer_encoding="chunked")
        while not server.stopped.is_set() and handler.send(more):
            pass

    with pytest.raises(BadImage, match="marks around chunks larger than 2 MB"):
        fetch(server.page("/img.png", page))


# Time.


def silent(handler: Handler) -> None:
    handler.server.stopped.wait()


def stuck(handler: Handler) -> None:
    handler.answer(200, PNG[:20], content_length="9999")
    handler.server.stopped.wait()


def dripping_body(handler: Handler) -> None:
    handler.answer(200)
    while not handler.server.stopped.wait(0.01) and handler.send(b"x"):
        pass


def dripping_header(handler: Handler) -> None:
    handler.send(b"HTTP/1.0 200 OK\r\nx: ")
    while not handler.server.stopped.wait(0.01) and handler.send(b"x"):
        pass


def redirecting_slowly(handler: Handler) -> None:
    handler.server.stopped.wait(0.1)
    handler.answer(302, location="/img.png")


def endless_interim_answers(handler: Handler) -> None:
    while not handler.server.stopped.is_set() and handler.send(b"HTTP/1.1 100 Continue\r\n\r\n"):
        handler.server.stopped.wait(0.01)


def dripping_marks(handler: Handler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.answer(200, transfer_encoding="chunked")
    while not handler.server.stopped.wait(0.01) and handler.send(b"0" * 3):
        pass


@for_each(
    "page",
    [silent, stuck, dripping_body, dripping_header, endless_interim_answers, dripping_marks, redirecting_slowly],
    own=(server,),
)
def test_a_slow_server_is_cut_off(page: Page, server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is left with no connection: none of our threads or sockets goes on behind the deadline."""
    monkeypatch.setattr(limits, "FETCH_SECONDS", 0.3)
    before = sockets()
    assert_refused(run, server.page("/img.png", page), "no answer within 0 s")
    assert sockets() == before


def sockets() -> int:
    """Of this process that are connected by us: those to where the test's servers listen."""
    listening = {one.laddr for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    return sum(one.raddr in listening for one in psutil.Process().net_connections("tcp"))


@pytest.mark.parametrize("drip", [b"", b"\x16\x03\x03\x40\x00" + b"\x02" * 4000])
def test_a_handshake_that_stalls_is_cut_off(drip: bytes, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and says nothing, or a byte of TLS at a time."""
    monkeypatch.setattr(limits, "FETCH_SECONDS", 0.3)
    closed, before = threading.Event(), threading.active_count()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(0.02)
                for byte in drip:
                    with suppress(OSError):
                        connection.send(bytes([byte]))
                    with suppress(TimeoutError):
                        while data := connection.recv(65536):
                            del data
                        break
                connection.settimeout(60)
                with suppress(ConnectionError):
                    while connection.recv(65536):
                        pass
                closed.set()

        thread = threading.Thread(target=serve)
        thread.start()
        assert_refused(run, f"https://127.0.0.1:{listener.getsockname()[1]}/img.png", "no answer within 0 s")
        assert closed.wait(60)
        thread.join()
    assert threading.active_count() == before


def test_a_slow_lookup_is_cut_off(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(host: str, port: int) -> str:
        server.stopped.wait()
        return "127.0.0.1"

    monkeypatch.setattr(module, "_resolve", hang)
    monkeypatch.setattr(limits, "FETCH_SECONDS", 0.1)
    assert_refused(run, "http://slow.example/img.png", "no answer within 0 s")


def test_a_stuck_lookup_keeps_its_slot_until_it_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many URLs come, so many threads hang at most; and others get their turn once one has ended."""
    monkeypatch.setattr(limits, "FETCHES", 2)
    monkeypatch.setattr(limits, "FETCH_SECONDS", 0.2)
    url, resolve, hang, begun = server.picture(), module._resolve, threading.Event(), []

    def look_up(host: str, port: int) -> str:
        if host == "stuck.example":
            begun.append(host)
            hang.wait(60)
        return resolve("127.0.0.1", port)

    monkeypatch.setattr(module, "_resolve", look_up)
    for _ in range(2):
        with pytest.raises(InputMissing, match="no answer within 0 s"):
            fetch("http://stuck.example/img.png")
    for one in ("http://stuck.example/img.png", url):
        with pytest.raises(InputMissing, match="2 others are still being fetched"):
            fetch(one)
    assert len(begun) == 2
    assert server.requests == []
    hang.set()
    monkeypatch.setattr(limits, "FETCH_SECONDS", 60.0)
    assert fetch(url) == PNG


def test_so_many_at_a_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "FETCHES", 3)
    monkeypatch.setattr(limits, "FETCH_SECONDS", 60.0)
    lock, here, most = threading.Lock(), [0], [0]
    together = threading.Barrier(3)

    def page(handler: Handler) -> None:
        with lock:
            here[0] += 1
            most[0] = max(most[0], here[0])
        together.wait(60)
        with lock:
            here[0] -= 1
        handler.answer(200, PNG)

    url = server.page("/img.png", page)
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(url))) for _ in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [PNG] * 9
    assert most == [3]


# Where it leads.


@for_each("status", [301, 302, 303, 307, 308], own=(server, other))
def test_redirects_are_followed(status: int, server: Server, other: Server) -> None:
    server.picture("/deep/img.png")
    other.redirect("/back", server.base + "/deep/img.png", status)
    server.redirect("/deep/absolute", other.base + "/back", status)
    server.redirect("/deep/relative", "absolute", status)
    server.redirect("/start", "/deep/relative?x=1", status)
    assert fetch(server.base + "/start") == PNG
    assert server.paths == ["/start", "/deep/relative?x=1", "/deep/absolute", "/deep/img.png"]
    assert other.paths == ["/back"]


def test_five_redirects_and_no_more(server: Server, run: Run) -> None:
    server.picture("/0")
    for n in range(1, 8):
        server.redirect(f"/{n}", f"/{n - 1}")
    assert limits.FETCH_REDIRECTS == 5
    assert fetch(server.base + "/5") == PNG
    assert_refused(run, server.base + "/6", "more than 5 redirects")
    assert server.paths[-1] == "/1"


def test_a_circle_of_redirects_is_refused(server: Server, run: Run) -> None:
    assert_refused(run, server.redirect("/img.png", "/img.png"), "more than 5 redirects")
    assert len(server.requests) == 6


@for_each(
    "location",
    ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1/img.png", "gopher://127.0.0.1:6379/_x", "https:///x"],
    own=(server,),
)
def test_a_redirect_leads_to_http_or_nowhere(location: str, server: Server, run: Run) -> None:
    assert_refused(run, server.redirect("/img.png", location), "redirects to an address that is not an http(s) URL")


@for_each(
    "location",
    ["http://[::1", "http://x:y/", "http://127.0.0.1:99999/", "data:image/png;base64,AAAA", "javascript:0"],
    own=(server,),
)
def test_a_malformed_redirect_is_refused(location: str, server: Server, run: Run) -> None:
    url = server.redirect("/img.png", location)
    result = run("ask", url, QUESTION)
    assert result.exit_code == 66
    assert result.stderr.startswith(f"llava: {url}: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.fixture
def seems_public(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a loopback address pass for a public one."""
    judge = module.is_public

    def choose(address: str) -> None:
        monkeypatch.setattr(module, "is_public", lambda text: text == address or judge(text))

    return choose


@pytest.mark.parametrize("target", ["http://127.0.0.2:{}/", "http://2130706434:{}/", "http://[::ffff:127.0.0.2]:{}/"])
def test_from_public_to_private_is_refused(
    target: str, server: Server, other: Server, run: Run, seems_public: Callable[[str], None]
) -> None:
    seems_public("127.0.0.1")
    other.picture("/")
    url = server.redirect("/img.png", target.format(other.server_port))
    assert_refused(run, url, "a public address redirects to a private one")
    assert other.requests == []


def test_from_private_over_public_to_private_is_refused(
    server: Server, other: Server, run: Run, seems_public: Callable[[str], None]
) -> None:
    seems_public("127.0.0.2")
    other.redirect("/back", server.picture())
    assert_refused(run, server.redirect("/start", other.base + "/back"), "a public address redirects to a private one")
    assert server.paths == ["/start"]


def test_from_public_to_public_is_followed(server: Server, seems_public: Callable[[str], None]) -> None:
    seems_public("127.0.0.1")
    server.picture()
    assert fetch(server.redirect("/start", "/img.png")) == PNG


def test_what_is_judged_is_dialled_though_the_name_moves(
    server: Server, other: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves anew each time: once for the judgement, and then never again."""
    server.picture()
    answers = iter(["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(module, "_resolve", lambda host, port: next(answers))
    assert fetch(f"http://moves.example:{server.server_port}/img.png") == PNG
    assert other.requests == []


# What is asked for.


def test_what_the_server_gets(server: Server) -> None:
    server.picture("/a%20b/%C3%A9.png")
    fetch(f"http://localhost:{server.server_port}/a b/é.png?x=1&y=%2F é#part")
    (path, headers), *_ = server.requests
    assert path == "/a%20b/%C3%A9.png?x=1&y=%2F%20%C3%A9"
    assert headers["Host"] == f"localhost:{server.server_port}"
    assert "Cookie" not in headers


def test_a_password_goes_to_its_host_only(server: Server, other: Server) -> None:
    other.picture()
    server.redirect("/start", other.base + "/img.png")
    fetch(f"http://me:secret@127.0.0.1:{server.server_port}/start")
    assert server.requests[0][1]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "Authorization" not in other.requests[0][1]


@for_each(
    ("url", "host"),
    [
        ("http://ok\\@evil.example:{}/img.png", "evil.example"),
        ("http://127.0.0.2\\@evil.example:{}/img.png", "evil.example"),
        ("http://evil.example:{}\\@127.0.0.2/img.png", None),
        ("http://evil.example:{}/img.png#@127.0.0.2/", "evil.example"),
        ("HTTP://EVIL.example:{}/img.png", "evil.example"),
        ("http://faß.example:{}/img.png", "xn--fa-hia.example"),
    ],
    own=(server,),
)
def test_one_host_is_resolved_dialled_and_named(
    url: str, host: str | None, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsers disagree on such URLs; here one of them has the only say."""
    resolved = []

    def resolve(name: str, port: int) -> str:
        resolved.append(name)
        return "127.0.0.1"

    monkeypatch.setattr(module, "_resolve", resolve)
    server.picture()
    try:
        fetch(url.format(server.server_port))
    except LlavaError as error:
        assert error.exit_code == 66
        assert (host, server.requests) == (None, [])
    else:
        assert resolved == [host]
        assert {k.lower(): v for k, v in server.requests[0][1].items()}["host"] == f"{host}:{server.server_port}"


@for_each(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("::ffff:127.0.0.1", "127.0.0.1"),
        ("::ffff:a9fe:a9fe", "169.254.169.254"),
        ("localhost", "127.0.0.1"),
        ("::1", "::1"),
    ],
)
def test_resolve(host: str, address: str) -> None:
    assert module._resolve(host, 80) == address


PUBLIC = """
93.184.215.14 1.1.1.1 100.63.255.255 100.128.0.0 172.15.255.255 172.32.0.0 192.0.1.0 198.17.255.255 198.20.0.0
223.255.255.255 2606:2800:21f:cb07:6820:80da:af6b:8b2c 2001:200:: 2001:4860:4860::8888 2a00:1450:4001:80b::200e
3ffe:831f::1 64:ff9b::5db8:d70e ::ffff:93.184.215.14 2606:2800::5efe:5db8:d70e
"""
NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1 172.31.255.255
192.0.0.1 192.0.0.170 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 192.175.48.1 198.18.0.1 198.19.255.255
198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 ::127.0.0.1 ::93.184.215.14 ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:0:93.184.215.14 ::ffff:0:127.0.0.1
64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 64:ff9b:1::5db8:d70e 64:ff9b:1:ffff::1 100::1 100:0:0:1::1 200::1 400::1
2001::1 2001:0:5db8:d70e:0:0:a247:28f1 2001:2::1 2001:3::1 2001:10::1 2001:1f:ffff::1 2001:20::1 2001:30::1 2001:db8::1
2002:7f00:1:: 2002:5db8:d70e::1 2620:4f:8000::1 3fff::1 3fff:fff:ffff::1 4000::1 5f00::1 8000::1
fc00::1 fd00::1 fdff:ffff::1 fe80::1 fe80::1%eth0 febf::1 fec0::1 feff::1 ff02::1 ff0e::1
2606:2800::5efe:7f00:1 2606:2800::200:5efe:a00:1 2606:2800::5efe:a9fe:a9fe 2606:2800:21f::1%1
"""


@for_each("address", PUBLIC.split())
def test_what_is_public(address: str) -> None:
    assert module.is_public(address)


@for_each("address", NOT_PUBLIC.split())
def test_what_is_not_public(address: str) -> None:
    """Whatever stands for an IPv4 address is judged as that, and no range is what a version of Python takes it for."""
    assert not module.is_public(address)


@for_each("host", ["[fec0::1]", "[64:ff9b:1::7f00:1]", "[::ffff:0:7f00:1]", "[2001:db8::5efe:7f00:1]"])
def test_a_picture_of_a_request_comes_from_no_such_address(host: str) -> None:
    with pytest.raises(InputMissing, match="not a public address"):
        fetch(f"http://{host}/img.png", public=True)


@for_each(
    ("url", "reason"),
    [
        ("http://", "no host"),
        ("http:///img.png", "no host"),
        ("https:///x", "no host"),
        ("http://[::1", "invalid IPv6 URL"),
        ("http://127.0.0.1:x/", "invalid port: 'x'"),
        ("http://127.0.0.1:99999/", "invalid port: '99999'"),
        ("http://127.0.0.1:0/", "invalid port: '0'"),
        ("http://127.0.0.1:\u0661/", None),
        ("http://a..b/", "invalid host name"),
        ("https://" + "a" * 64 + ".example/", "invalid host name"),
        ("https://./", "invalid host name"),
        ("http://a\nb/", None),
        ("http://127.0.0.1/\x1b[31m", None),
        ("http://\u202ea/", None),
        ("http://\udcff/", None),
        ("http://127.0.0.1/" + "x" * 70_000, None),
    ],
)
def test_malformed_urls_are_refused(url: str, reason: str | None, run: Run) -> None:
    result = run("ask", url, QUESTION)
    (line,) = result.stderr.splitlines()
    assert line.isprintable()
    assert line.startswith("llava: http")
    assert reason is None or line == f"llava: {url}: {reason}"
    assert (result.exit_code, result.stdout) == (66, "")


def test_an_error_is_raised_where_fetch_was_called() -> None:
    with pytest.raises(InputMissing, match="no host"):
        fetch("http://")
