"""The commands against OpenAI-compatible servers elsewhere: good ones, real ones, and those that fail in every way."""

from __future__ import annotations

import base64
import io
import itertools
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Run
from helpers.peer import Peer, Reply, answer, delta, hang_up, say, serving, stream
from helpers.servers import Serve
from helpers.tables import for_each
from helpers.tls import of_a_server
from PIL import Image

from llava_cli import bounded_http, limits
from llava_cli.engine.remote import remote_engine
from llava_cli.images.reader import open_picture

QUESTION = "what color is the circle?"


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    with serving() as it:
        yield it


def test_ask(peer: Peer, run: Run, drawing: Path) -> None:
    words = ("--system", "Be short.", "--max-tokens", "9", "--seed", "3", "--stop", ".")
    asked = run("ask", "--server", peer.url, "--stats", drawing, QUESTION, *words)
    assert asked.stdout == "red\n"
    assert asked.stderr.startswith(f"its-model · {peer.url}/v1 · first token ")
    assert " s of 7 · " in asked.stderr
    assert "peak" not in asked.stderr
    (sent,) = peer.asked
    url = sent["messages"][1]["content"][0].pop("image_url")["url"]
    assert url == "data:image/png;base64," + base64.b64encode(drawing.read_bytes()).decode()
    assert sent == {
        "model": "its-model",
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": QUESTION}]},
        ],
        "max_tokens": 9,
        "seed": 3,
        "stop": ["."],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_json(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = answer(" red", "length")
    said = json.loads(run("ask", "--server", f"{peer.url}/v1/", "--json", drawing, QUESTION).stdout)
    assert (said["answer"], said["model"], said["finish_reason"]) == ("red", "its-model", "length")
    assert (said["precision"], said["device"]) == (None, None)
    assert (said["prompt_tokens"], said["answer_tokens"]) == (7, 3)


def test_without_what_not_every_server_says(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = stream(delta("a "), delta("red"), delta(" circle", "eos"))
    said = json.loads(run("ask", "--server", peer.url, "--json", drawing, QUESTION).stdout)
    assert (said["answer"], said["finish_reason"], said["answer_tokens"]) == ("a red circle", "stop", 3)


def test_chat(peer: Peer, run: Run, drawing: Path) -> None:
    talked = run("chat", "--server", peer.url, drawing, input=f"{QUESTION}\n/system Be short.\n/prompt\nand now?\n")
    assert talked.exit_code == 0, talked.stderr
    first, second = peer.asked
    assert [m["role"] for m in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][1]["content"] == first["messages"][0]["content"]
    assert second["messages"][3]["content"] == "and now?"
    assert str(drawing) in talked.stdout  # /prompt: the messages, their pictures by name


def test_from_the_environment_and_the_config_file(peer: Peer, run: Run, drawing: Path, home: Path) -> None:
    (home / "config.toml").write_text(f'server = "{peer.url}"\napi_key = "sésame"\nmodel = "mine"\n', "utf-8")
    assert run("ask", drawing, QUESTION).stdout == "red\n"
    assert peer.asked[0]["model"] == "mine"
    assert all(sent["Authorization"].encode("latin-1").decode() == "Bearer sésame" for sent in peer.headers)
    assert run("ask", "--server", "", "-m", "builtin", drawing, QUESTION).stdout == "red\n"
    assert len(peer.asked) == 1


def test_a_key_that_is_no_text(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "open\nsesame")
    said = run("ask", "--server", peer.url, drawing, QUESTION)
    assert (said.exit_code, said.stderr) == (2, "llava: LLAVA_API_KEY: not one line of text\n")


def test_the_key_is_told_to_nobody(
    peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    peer.usual = say(401, {"error": {"message": "wrong key", "type": "authentication_error"}})
    said = run("batch", "--server", peer.url, drawing.parent, QUESTION, "-o", tmp_path / "out.jsonl")
    assert said.exit_code == 69
    assert f"llava: {peer.url}/v1: wrong key\n" in said.stderr
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file() and p.suffix in (".json", ".jsonl")]
    assert written
    assert not any("sesame" in text for text in [said.stderr, said.stdout, *written])


# How it is reached.


@pytest.fixture
def trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ssl.SSLContext]:
    """What a server at localhost speaks, and the commands trust."""
    context, file = of_a_server(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    bounded_http.tls_context.cache_clear()
    yield context
    bounded_http.tls_context.cache_clear()


def test_over_tls(trusted: ssl.SSLContext, run: Run, drawing: Path) -> None:
    with serving(trusted) as peer:
        assert run("ask", "--server", peer.url, drawing, QUESTION).stdout == "red\n"
        assert run("ask", "--server", peer.url.replace("127.0.0.1", "localhost"), drawing, QUESTION).stdout == "red\n"
        assert len(peer.asked) == 2


def test_a_certificate_that_nobody_trusts(
    trusted: ssl.SSLContext, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key is not told to whoever answers."""
    monkeypatch.delenv("SSL_CERT_FILE")
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    with serving(trusted) as peer:
        said = run("ask", "--server", peer.url, drawing, QUESTION)
        assert (said.exit_code, peer.headers) == (69, [])
        assert said.stderr.startswith(f"llava: {peer.url}/v1: does not answer (certificate verify failed")


@for_each(
    "variable, scheme", itertools.product(["http_proxy", "HTTP_PROXY", "ALL_PROXY"], ["http://", ""]), own=(peer,)
)
def test_by_a_proxy(
    scheme: str, variable: str, peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = peer.url.removeprefix("http://")
    monkeypatch.setenv(variable, f"{scheme}me:s%40cret@{where}")
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    assert run("ask", "--server", "http://api.example:8000/v1", drawing, QUESTION).stdout == "red\n"
    assert peer.targets == [f"http://api.example:8000/v1/{path}" for path in ("models", "chat/completions")]
    for headers in peer.headers:
        assert headers["Host"] == "api.example:8000"
        assert headers["Proxy-Authorization"] == "Basic bWU6c0BjcmV0"
        assert headers["Authorization"] == "Bearer open-sesame"


def test_not_by_a_proxy(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert run("ask", "--server", peer.url, drawing, QUESTION).stdout == "red\n"
    assert peer.targets[0] == "/v1/models"


def tunnel(listener: socket.socket, heads: list[bytes], status: int) -> None:
    """A proxy that connects whoever asks for it, once for each request."""

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with suppress(OSError):
        while True:
            client, _ = listener.accept()
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1)
            heads.append(head)
            client.sendall(b"HTTP/1.1 %d It\r\n\r\n" % status)
            if status != 200:
                client.close()
                continue
            host, _, port = head.split(b" ")[1].decode().rpartition(":")
            server = socket.create_connection((host, int(port)))
            for pair in ((client, server), (server, client)):
                threading.Thread(target=pass_on, args=pair, daemon=True).start()


@pytest.mark.parametrize("status", [200, 407])
def test_tls_by_a_proxy(
    status: int, trusted: ssl.SSLContext, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees where to, and neither the key nor the picture."""
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    heads: list[bytes] = []
    with serving(trusted) as peer, socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=tunnel, args=(listener, heads, status), daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{listener.getsockname()[1]}")
        said = run("ask", "--server", peer.url, drawing, QUESTION)
        listener.shutdown(socket.SHUT_RDWR)
        assert len(peer.asked) == (status == 200)
    if status == 200:
        assert said.stdout == "red\n"
        assert peer.headers[0]["Authorization"] == "Bearer open-sesame"
    else:
        assert f"llava: {peer.url}/v1: does not answer (its proxy answers 407)" in said.stderr
        assert said.exit_code == 69
    there = peer.url.removeprefix("https://").encode()
    for head in heads:
        assert head.startswith(b"CONNECT %s HTTP/1.1\r\n" % there)
        assert b"\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" in head
        assert b"sesame" not in head


@for_each("proxy", ["socks5://me:secret@127.0.0.1:9", "https://me:secret@127.0.0.1:9", "http://", "http://a:b"])
def test_a_proxy_that_is_none(proxy: str, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    said = run("ask", "--server", "http://api.example", drawing, QUESTION)
    assert said.exit_code == 2
    assert said.stderr.startswith("llava: the proxy for --server: not an http:// address\n  NO_PROXY=api.example")
    assert "secret" not in said.stderr


@for_each(
    ("url", "reason"),
    [
        ("api.example/v1", "not an http(s) address\n  --server https://api.example/v1"),
        ("ftp://localhost", "not an http(s) address"),
        ("http://", "not an http(s) address"),
        ("http://localhost:99999", "not an http(s) address"),
        ("http://[::1", "not an http(s) address"),
        ("http://a..b", "not an http(s) address"),
        ("http://" + "a" * 64 + ".example", "not an http(s) address"),
        ("https://" + "a." * 40_000, "not an http(s) address"),
        ("http://localhost/\x1b[2J", "not an http(s) address"),
        ("http://me:key@localhost", "an address without a name, a key or a query"),
        ("http://localhost/v1?key=1", "an address without a name, a key or a query"),
        ("http://127.0.0.1:9", "does not answer (connection refused)"),
    ],
)
def test_an_address_that_is_none(url: str, reason: str, run: Run, drawing: Path) -> None:
    said = run("ask", "--server", url, drawing, QUESTION)
    assert said.exit_code == (69 if ":9" in url and "99" not in url else 2)
    assert reason in said.stderr
    assert "key@" not in said.stderr


def test_what_the_server_decides(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = run("ask", "--server", peer.url, "-p", "4bit", drawing, QUESTION)
    assert said.exit_code == 2
    assert f"llava: --precision: {peer.url} decides that\n" in said.stderr
    said = run("batch", "--server", peer.url, "--batch-size", "4", drawing.parent, QUESTION)
    assert (said.exit_code, "--concurrency N" in said.stderr) == (2, True)
    monkeypatch.setenv("LLAVA_PRECISION", "4bit")  # said once for all is not said of this server
    assert run("ask", "--server", peer.url, drawing, QUESTION).stdout == "red\n"


@for_each(
    ("models", "words", "reason"),
    [
        (say(200, {"data": [{"id": "a"}, {"id": "b"}]}), (), "has several models\n  -m NAME asks for one of a, b"),
        (say(200, {"data": []}), (), "does not say which models it has"),
        (say(404, {}), (), "does not say which models it has"),
        (say(200, b"<html>"), (), "does not say which models it has"),
        (say(401, {"error": {"message": "no key"}}), ("-m", "a"), "no key\n  LLAVA_API_KEY"),
        (say(500, {}), (), "fails (status 500), 8 times"),
    ],
    own=(peer,),
)
def test_no_model_can_be_chosen(
    models: Reply, words: tuple[str, ...], reason: str, peer: Peer, run: Run, drawing: Path
) -> None:
    peer.models = models
    said = run("ask", "--server", peer.url, drawing, QUESTION, *words)
    assert said.exit_code == 69
    assert reason in said.stderr
    assert not peer.asked


@for_each("models", [say(404, {}), say(500, b"oh"), say(200, b"<html>"), hang_up], own=(peer,))
def test_a_model_that_was_named_need_not_be_listed(models: Reply, peer: Peer, run: Run, drawing: Path) -> None:
    peer.models = models
    assert run("ask", "--server", peer.url, "-m", "its", drawing, QUESTION).stdout == "red\n"
    assert peer.asked[0]["model"] == "its"


@for_each(
    "failure",
    [
        say(429, {"error": {"message": "too many"}}, Retry_After="0.01"),
        say(503, b"loading", Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"),
        say(500, {"detail": "oh"}),
        say(408, {}),
        hang_up,
        stream(delta("re"), cut=True),
        stream(delta("re")),
        stream(delta("re"), 'data: {"error": {"message": "oh", "code": 500}}'),
    ],
    own=(peer,),
)
def test_it_is_asked_again(failure: Reply, peer: Peer, run: Run, drawing: Path) -> None:
    peer.replies = [failure] * 7
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert asked.stdout == "red\n"
    assert asked.stderr.count("asking again") == 1
    assert len(peer.asked) == 8


def test_not_for_ever(peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(503, {"error": "overloaded\x1b[2J"})
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert asked.exit_code == 69
    assert f"llava: {peer.url}/v1: fails (overloaded\\x1b[2J), 8 times\n  the same command" in asked.stderr
    assert len(peer.asked) == 8


@for_each(("wish", "pause"), [("7", 7.0), ("inf", 120.0), ("-3", 0.0), ("nan", 0.0), ("soon", 0.0)], own=(peer,))
def test_a_server_is_left_alone_as_long_as_it_asks_to_be(
    wish: str, pause: float, peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote_engine.time, "sleep", pauses.append)
    peer.replies = [say(429, {}, Retry_After=wish)]
    assert run("ask", "--server", peer.url, drawing, QUESTION).stdout == "red\n"
    assert pauses == [pause]


def test_a_server_that_says_nothing(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLY_SECONDS", 0.05)
    monkeypatch.setattr(remote_engine, "MAX_ATTEMPTS", 2)
    over = threading.Event()
    peer.usual = lambda handler, asked: over.wait(60) and None
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    over.set()
    assert asked.exit_code == 69
    assert "/v1: no answer within 0 s, 2 times\n" in asked.stderr


def test_an_answer_that_begins_otherwise_is_not_glued_together(peer: Peer, run: Run, drawing: Path) -> None:
    peer.replies = [stream(delta("a bl"), cut=True)]
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert (asked.stdout, asked.exit_code) == ("a bl\n", 69)
    assert "llava: answer: broke off, and asked again it has another beginning\n" in asked.stderr


@for_each(
    ("failure", "code", "words"),
    [
        (say(400, {"error": {"message": "no pictures here", "type": "BadRequestError"}}), 65, "/v1: no pictures here"),
        (say(422, {"detail": "malformed"}), 65, "/v1: malformed"),
        (say(400, {"error": {"message": "its own code", "code": 20003}}), 65, "/v1: its own code"),
        (say(413, b""), 65, "/v1: takes no more (status 413)"),
        (say(404, {"error": {"message": "no such model"}}), 69, "/v1: no such model\n  -m NAME"),
        (
            say(400, {"error": {"message": "prompt: 9 tokens", "code": "context_length_exceeded"}}),
            65,
            "llava: prompt: 9 tokens",
        ),
        (
            say(400, {"error": {"message": "the request exceeds it", "type": "exceed_context_size_error"}}),
            65,
            "llava: prompt: the request exceeds it",
        ),
        (
            say(400, {"error": {"message": "This model's maximum context length is 9", "code": 400}}),
            65,
            "llava: prompt: This model's maximum",
        ),
        (stream('data: {"error": {"message": "bad", "type": "invalid_request_error"}}'), 65, "/v1: bad"),
        (say(200, b"<html>"), 69, "does not speak OpenAI's chat completions"),
        (stream("data: oh"), 69, "does not speak OpenAI's chat completions"),
    ],
    own=(peer,),
)
def test_errors_that_are_not_retried(
    failure: Reply, code: int, words: str, peer: Peer, run: Run, drawing: Path
) -> None:
    peer.usual = failure
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert (asked.exit_code, asked.stdout) == (code, "")
    assert words in asked.stderr
    assert len(peer.asked) <= 8


def photos(folder: Path, drawing: Path, count: int) -> Path:
    (folder / "photos").mkdir()
    for number in range(count):
        (folder / "photos" / f"{number:02}.png").write_bytes(drawing.read_bytes())
    return folder / "photos"


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_batch(peer: Peer, run: Run, drawing: Path, tmp_path: Path) -> None:
    """As many at a time as it should be, a row each, in order, whatever fails in between."""
    folder, together = photos(tmp_path, drawing, 12), threading.Barrier(3)

    def three_at_once(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        together.wait(60)
        answer("red")(handler, asked)

    (folder / "05.png").write_bytes(b"no picture")
    peer.replies = [three_at_once] * 3 + [say(429, {}), hang_up, say(400, {"error": "not this one"}), say(500, {})]
    done = run("batch", "--server", peer.url, "--concurrency", "3", folder, QUESTION, "-o", tmp_path / "out.jsonl")
    assert done.exit_code == 1
    found = rows(tmp_path / "out.jsonl")
    assert [row["image"] for row in found] == sorted(path.name for path in folder.iterdir())
    wrong = [row["error"] for row in found if row["status"] == "error"]
    assert {"type": "BadImage", "message": "not an image"} in wrong
    assert {"type": "BadData", "message": "not this one"} in wrong
    assert len(wrong) == 2
    assert all((row["answer"], row["answer_tokens"]) == ("red", 3) for row in found if row["status"] == "ok")
    again = ("batch", "--server", peer.url, folder, QUESTION, "-o", tmp_path / "out.jsonl", "--retry-errors")
    assert run(*again).exit_code == 1  # it is still no picture
    assert sum(row["status"] == "error" for row in rows(tmp_path / "out.jsonl")) == 1


def test_a_batch_goes_on_once_its_server_is_back(peer: Peer, run: Run, drawing: Path, tmp_path: Path) -> None:
    """What nobody answers is no row with an error: the run ends, and goes on from there."""
    folder, output = photos(tmp_path, drawing, 20), tmp_path / "out.jsonl"
    words = ("batch", "--server", peer.url, "--concurrency", "2", folder, QUESTION, "-o", output)
    peer.replies, peer.usual = [answer("red")] * 6, say(401, {"error": {"message": "the key has run out"}})
    stopped = run(*words)
    assert stopped.exit_code == 69
    assert "the key has run out" in stopped.stderr
    assert len(rows(output)) <= 6
    peer.usual = answer("red")
    assert run(*words).exit_code == 0
    assert [(row["image"], row["answer"]) for row in rows(output)] == [(f"{n:02}.png", "red") for n in range(20)]


@pytest.mark.parametrize("failure", [say(503, {}), say(400, {"error": "no pictures here"})])
def test_a_batch_does_not_fill_with_errors(failure: Reply, peer: Peer, run: Run, drawing: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path, drawing, 30), tmp_path / "out.jsonl"
    peer.usual = failure
    stopped = run("batch", "--server", peer.url, "--concurrency", "2", folder, QUESTION, "-o", output)
    assert stopped.exit_code in (65, 69)
    assert len(rows(output)) <= 2


def test_a_batch_is_of_one_server_and_model(peer: Peer, run: Run, drawing: Path, tmp_path: Path) -> None:
    folder, output = photos(tmp_path, drawing, 2), tmp_path / "out.jsonl"
    words = ("batch", "--server", peer.url, folder, QUESTION, "-o", output)
    assert run(*words).exit_code == 0
    other = run(*words, "-m", "another")
    assert other.exit_code == 65
    assert "model" in other.stderr
    assert run("batch", folder, QUESTION, "-o", output).exit_code == 65


def sent(peer: Peer, run: Run, path: Path, *words: str) -> tuple[str, bytes]:
    asked = run("ask", "--server", peer.url, path, QUESTION, *words)
    assert asked.stdout == "red\n", asked.stderr
    return peer.pictures[-1]


@for_each("kind, mode", itertools.product(["PNG", "JPEG"], ["RGB", "L"]), own=(peer,))
def test_plain_pictures_are_sent_as_they_are(kind: str, mode: str, peer: Peer, run: Run, tmp_path: Path) -> None:
    Image.effect_noise((60, 40), 90).convert(mode).save(path := tmp_path / "picture.any", kind)
    assert sent(peer, run, path) == (f"data:image/{kind.lower()}", path.read_bytes())


def turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((40, 40), 90).convert("RGB").save(path, "JPEG", exif=exif)


@for_each(
    ("save", "kind"),
    [
        (turned, "jpeg"),
        (lambda path: Image.new("CMYK", (40, 40), (9, 200, 3, 40)).save(path, "JPEG"), "jpeg"),
        (lambda path: Image.new("RGBA", (40, 40), (200, 0, 0, 90)).save(path, "PNG"), "png"),
        (lambda path: Image.new("I;16", (40, 40), 30000).save(path, "PNG"), "png"),
        (lambda path: Image.new("RGB", (40, 40), "red").save(path, "WEBP", lossless=True), "png"),
        (lambda path: Image.new("P", (40, 40), 3).save(path, "GIF"), "png"),
    ],
    own=(peer,),
)
def test_others_as_we_see_them(save: Callable[[Path], None], kind: str, peer: Peer, run: Run, tmp_path: Path) -> None:
    """Who does not turn, composite or scale as we do gets it done."""
    save(path := tmp_path / "picture.any")
    named, data = sent(peer, run, path)
    assert named == f"data:image/{kind}"
    ours, theirs = open_picture(str(path)).image, Image.open(io.BytesIO(data))
    assert (theirs.format, theirs.mode) == (kind.upper(), "RGB")
    pairs = zip(ours.tobytes(), theirs.tobytes(), strict=True)
    assert max(abs(one - other) for one, other in pairs) <= (12 if kind == "jpeg" else 0)


def test_what_there_is_of_a_picture(peer: Peer, run: Run, drawing: Path) -> None:
    drawing.write_bytes(drawing.read_bytes()[:-40])
    _, data = sent(peer, run, drawing, "--allow-truncated")
    Image.open(io.BytesIO(data)).load()
    assert data != drawing.read_bytes()


def test_a_server_of_ours_elsewhere(
    serve: Serve, run: Run, drawing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, words = photos(tmp_path, drawing, 5), (QUESTION, "--question", "what is this?", "-q")
    alone = run("batch", folder, *words, "-p", "fp32")
    server = serve(LLAVA_API_KEY="open-sesame")
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    monkeypatch.setenv("LLAVA_SOCKET", str(tmp_path / "none.sock"))
    url = f"http://127.0.0.1:{server.port}"
    assert run("batch", "--server", url, folder, *words, "--verify", "2").stdout == alone.stdout
    assert run("ask", "--server", url, drawing, QUESTION).stdout == "red\n"
    drawing.write_bytes(b"GIF89a")
    assert run("ask", "--server", url, drawing, QUESTION).exit_code == 65
