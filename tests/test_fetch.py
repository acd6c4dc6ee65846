"""Pictures by URL, from real servers on this machine: friendly, broken, slow, endless and devious ones."""

from __future__ import annotations

import gzip
import io
import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import Run
from PIL import Image

from llava_cli import fetch as module
from llava_cli.errors import BadImage, InputMissing, LlavaError
from llava_cli.fetch import fetch
from llava_cli.images import open_picture

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


def assert_refused(run: Run, url: str, reason: str, code: int = 66) -> None:
    result = run("ask", url, QUESTION)
    assert result.stderr.splitlines() == [f"llava: {url}: {reason}"]
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


@pytest.mark.parametrize("kind", ["text/html", "application/octet-stream", "image/svg+xml", ""])
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


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 418, 429, 500, 503])
def test_any_status_but_200_is_refused(status: int, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(status))
    assert_refused(run, url, f"the server answered {status}")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_nowhere_is_refused(status: int, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(status))
    assert_refused(run, url, f"the server answered {status}")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "empty file"),
        (b"<html>please log in</html>", "not an image"),
        (b"<svg/>", "SVG is not a supported image"),
        (PNG[:30], "truncated or damaged"),
    ],
)
def test_what_is_no_picture_is_refused(body: bytes, reason: str, server: Server, run: Run) -> None:
    url = server.page("/img.png", lambda h: h.answer(200, body, content_type="image/png"))
    assert_refused(run, url, reason, 65)


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
    monkeypatch.setattr(module, "MAX_BYTES", 1_000_000)
    url = server.page("/img.png", lambda h: h.answer(200, bytes(int(h.path.partition("?")[2]))))
    assert len(fetch(url + "?1000000")) == 1_000_000
    with pytest.raises(BadImage, match="larger than 1 MB"):
        fetch(url + "?1000001")


def test_a_compressed_answer_is_not_unpacked(server: Server, run: Run) -> None:
    bomb = gzip.compress(bytes(50_000_000))
    url = server.page("/img.png", lambda h: h.answer(200, bomb, content_encoding="gzip"))
    assert_refused(run, url, "not an image", 65)
    assert server.requests[0][1]["accept-encoding"] == "identity"


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


@pytest.mark.parametrize("page", [silent, stuck, dripping_body, dripping_header, redirecting_slowly])
def test_a_slow_server_is_cut_off(page: Page, server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SECONDS", 0.3)
    assert_refused(run, server.page("/img.png", page), "no answer within 0 s")


def test_a_slow_lookup_is_cut_off(server: Server, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(host: str, port: int) -> str:
        server.stopped.wait()
        return "127.0.0.1"

    monkeypatch.setattr(module, "_resolve", hang)
    monkeypatch.setattr(module, "MAX_SECONDS", 0.1)
    assert_refused(run, "http://slow.example/img.png", "no answer within 0 s")


# Where it leads.


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
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
    assert fetch(server.base + "/5") == PNG
    assert_refused(run, server.base + "/6", "more than 5 redirects")
    assert server.paths[-1] == "/1"


def test_a_circle_of_redirects_is_refused(server: Server, run: Run) -> None:
    assert_refused(run, server.redirect("/img.png", "/img.png"), "more than 5 redirects")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "location",
    ["file:///etc/passwd", "FILE:/etc/passwd", "ftp://127.0.0.1/img.png", "gopher://127.0.0.1:6379/_x", "https:///x"],
)
def test_a_redirect_leads_to_http_or_nowhere(location: str, server: Server, run: Run) -> None:
    assert_refused(run, server.redirect("/img.png", location), "leads to an address that is no http(s) URL")


@pytest.mark.parametrize(
    "location",
    ["http://[::1", "http://x:y/", "http://127.0.0.1:99999/", "data:image/png;base64,AAAA", "javascript:0"],
)
def test_a_malformed_redirect_is_refused(location: str, server: Server, run: Run) -> None:
    url = server.redirect("/img.png", location)
    result = run("ask", url, QUESTION)
    assert result.exit_code == 66
    assert result.stderr.startswith(f"llava: {url}: ")
    assert len(result.stderr.splitlines()) == 1


class Public(ipaddress.IPv4Address):
    is_global = True


@pytest.fixture
def seems_public(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a loopback address pass for a public one; where it is dialled stays the same."""
    judge = ipaddress.ip_address

    def choose(address: str) -> None:
        monkeypatch.setattr(ipaddress, "ip_address", lambda text: Public(text) if text == address else judge(text))

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
    assert headers["Host" if "Host" in headers else "host"] == f"localhost:{server.server_port}"
    assert "Cookie" not in headers


def test_a_password_goes_to_its_host_only(server: Server, other: Server) -> None:
    other.picture()
    server.redirect("/start", other.base + "/img.png")
    fetch(f"http://me:secret@127.0.0.1:{server.server_port}/start")
    assert server.requests[0][1]["Authorization"] == "Basic bWU6c2VjcmV0"
    assert "Authorization" not in other.requests[0][1]


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://ok\\@evil.example:{}/img.png", "evil.example"),
        ("http://127.0.0.2\\@evil.example:{}/img.png", "evil.example"),
        ("http://evil.example:{}\\@127.0.0.2/img.png", None),
        ("http://evil.example:{}/img.png#@127.0.0.2/", "evil.example"),
        ("HTTP://EVIL.example:{}/img.png", "evil.example"),
        ("http://faß.example:{}/img.png", "xn--fa-hia.example"),
    ],
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


@pytest.mark.parametrize(
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


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", True),
        ("64:ff9b::5db8:d70e", True),
        ("10.0.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("::127.0.0.1", False),
    ],
)
def test_what_an_address_stands_for_is_judged(address: str, public: bool) -> None:
    """Be it an IPv4 address behind NAT64 or 6to4, or a whole group's."""
    assert module.is_public(address) is public


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://", "no host"),
        ("http:///img.png", "no host"),
        ("https://?x", "no host"),
        ("http://[::1", "invalid port: ':1'"),
        ("http://127.0.0.1:x/", "invalid port: 'x'"),
        ("http://127.0.0.1:99999/", None),
        ("http://a\nb/", None),
        ("http://127.0.0.1/\x1b[31m", None),
        ("http://\u202ea/", None),
        ("http://\udcff/", None),
        ("http://127.0.0.1/" + "x" * 70_000, None),
    ],
    ids=ascii,
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
