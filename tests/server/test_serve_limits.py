"""What one client of `llava serve` cannot do to the others: stall it, fill it, or outstay its time."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest
from helpers.servers import Endpoint, connected, in_thread, post, response
from helpers.tables import for_each
from PIL import Image

from llava_cli import limits, load
from llava_cli.conversation import Picture
from llava_cli.engine import Request
from llava_cli.engine.local import LocalEngine
from llava_cli.errors import InputMissing
from llava_cli.server import pictures
from llava_cli.server.api_error import ApiError
from llava_cli.server.bodies import parse_chat_request
from llava_cli.server.generation import ClientGone, GenerationService
from llava_cli.server.pictures import PictureOpener

CHAT = "/v1/chat/completions"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CHUNKED = post(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return load("builtin", precision="fp32", device="cpu")


@pytest.fixture
def server(engine: LocalEngine, tmp_path: Path) -> Iterator[Endpoint]:
    with in_thread(engine, tmp_path) as running:
        yield running


def said(*content: Any, **options: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": list(content)}], "max_tokens": 1, **options}).encode()


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def shown(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(data).decode()}}


def png(size: int = 64) -> bytes:
    Image.new("RGB", (size, size), "red").save(file := io.BytesIO(), "PNG")
    return file.getvalue()


SMALL = said(text("what is this?"), shown(png()))


def refused(server: Endpoint, request: bytes, status: int) -> dict[str, Any]:
    """The error that a request gets, after which the server is well."""
    with closing(connected(server, request)) as connection:
        told, headers, body = response(connection)
    assert told == status, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert server.ask("/health")[0] == 200
    return {**body["error"], "headers": headers}


# Bodies.


def test_a_million_values_are_refused_before_they_are_all_there(server: Endpoint) -> None:
    beginning = b'{"messages": [' + b"0," * limits.BODY_ITEMS
    error = refused(server, post(beginning, length=limits.BODY_BYTES), 400)
    assert error["message"] == f"the body: more than {limits.BODY_ITEMS:,} values"
    assert error["headers"]["connection"] == "close"


def test_depth_is_refused_before_it_is_parsed(server: Endpoint) -> None:
    error = refused(server, post(b"[" * (limits.BODY_DEPTH + 1), length=1000), 400)
    assert error["message"] == f"the body: nested deeper than {limits.BODY_DEPTH} levels"


def test_bytes_are_counted_where_nobody_says_how_many(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES", 10_000)
    error = refused(server, CHUNKED + (b"1000\r\n" + b" " * 4096 + b"\r\n") * 3, 413)
    assert error["message"] == "the body: larger than 10,000 bytes"
    assert refused(server, post(b"", length=10_001), 413)["headers"]["connection"] == "close"


def test_our_own_commands_may_send_more(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_BYTES", 100)
    monkeypatch.setattr(limits, "OWN_BODY_BYTES", 100_000)
    with closing(connected(server, post(SMALL), own=True)) as connection:
        assert response(connection)[0] == 200
    with closing(connected(server, post(b"", length=100_001), own=True)) as connection:
        assert response(connection)[0] == 413


def test_encodings_in_which_marks_cannot_be_seen(server: Endpoint) -> None:
    """In UTF-16 a sign may hold the byte of a quotation mark, behind which nothing would be counted."""
    body = ('{"messages": ["\u2231",' + "0," * limits.BODY_ITEMS + "0]}").encode("utf-16-le")
    assert refused(server, post(body), 400)["message"].startswith("the body is no JSON")
    assert "UTF-8" in refused(server, post(body.decode("utf-16-le").encode("utf-16")), 400)["message"]
    assert "messages.0" in refused(server, post(b'\xef\xbb\xbf{"messages": [0]}'), 400)["message"]


@for_each("number", ["1" * 401, "-" + "1" * 100_000, "1." + "0" * 1000, "1e" + "0" * 500, "NaN", "-Infinity"])
def test_numbers_that_take_long_or_are_none(number: str) -> None:
    assert min(map(len, ("1" * 401, "1." + "0" * 1000))) > limits.NUMBER_CHARACTERS
    with pytest.raises(ApiError, match="the body is no JSON"):
        parse_chat_request(bytearray(f'{{"messages": [], "seed": {number}}}'.encode()))


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({"messages": [0] * 49_000}, "messages.0: "),
        ({"messages": [{"role": "user", "content": [0] * 49_000}]}, "messages.0.content.0: "),
        ({"messages": [{"role": "user", "content": "a"}], "stop": [0] * 49_000}, "stop.0: "),
    ],
)
def test_of_many_mistakes_one_is_named(body: Any, place: str, server: Endpoint) -> None:
    assert refused(server, post(json.dumps(body).encode()), 400)["message"].startswith(place)


def test_a_body_that_drips_is_not_waited_for(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    error = refused(server, post(b"{", length=100), 408)
    assert "takes at most" in error["message"]
    assert error["headers"]["connection"] == "close"


def test_a_body_that_nobody_reads_is_not_waited_for_either(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a request that was answered without it; however it goes on dripping."""
    monkeypatch.setattr(limits, "HEAD_SECONDS", 0.5)
    with closing(connected(server, post(b"{", path="/health", length=limits.BODY_BYTES))) as connection:
        assert response(connection)[0] == 405
        with pytest.raises(OSError):
            while True:
                connection.sendall(b" ")


def test_bodies_are_counted_together(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODIES_BYTES", 100_000)
    with closing(connected(server, post(b" " * 90_000, length=99_000))):
        with closing(connected(server, post(b" " * 20_000))) as connection:
            status, headers, body = response(connection)
        assert (status, body["error"]["code"], headers["retry-after"]) == (503, "busy", "1")
        with closing(connected(server, post(SMALL), own=True)) as connection:  # which does not count
            assert response(connection)[0] == 200
    while refusal(server):  # until the first one has gone
        pass


def refusal(server: Endpoint) -> bool:
    with closing(connected(server, post(b" " * 20_000))) as connection:
        return response(connection)[0] == 503


def test_large_bodies_leave_room_for_small_ones(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODIES_BYTES", 100_000)
    monkeypatch.setattr(limits, "LARGE_BODY_BYTES", 10_000)
    assert refused(server, post(b" " * 76_000), 503)["code"] == "busy"
    with closing(connected(server, post(b" " * 74_000, length=99_000))), closing(connected(server, post(SMALL))) as one:
        assert response(one)[0] == 200


def test_requests_that_wait_for_their_pictures_are_counted_too(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WAITING_BYTES", len(SMALL) - 1)
    assert refused(server, post(SMALL), 503)["code"] == "busy"
    monkeypatch.setattr(limits, "WAITING_BYTES", len(SMALL))
    for _ in range(3):  # and no more when they are answered
        with closing(connected(server, post(SMALL))) as connection:
            assert response(connection)[0] == 200


# What a request asks for.


@for_each("where", ["content", "parts", "system", "turns"], own=(server,))
def test_text_is_counted_wherever_it_is(where: str, server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TEXT_CHARACTERS", 1000)
    half = {"role": "user", "content": "a" * 501}
    messages: dict[str, list[Any]] = {
        "content": [{"role": "user", "content": "a" * 1001}],
        "parts": [{"role": "user", "content": [text("a" * 501), text("a" * 501)]}],
        "system": [{"role": "system", "content": "a" * 501}, half],
        "turns": [{**half, "content": "a"}, {"role": "assistant", "content": "a" * 501}, half],
    }
    with pytest.raises(openai.BadRequestError, match="a request has at most 1,000") as raised:
        server.client().chat.completions.create(model="builtin", messages=messages[where])
    assert (raised.value.param, raised.value.code) == ("messages", "context_length_exceeded")


def test_pictures_and_stops_are_counted_before_any_is_looked_at(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REQUEST_PICTURES", 3)
    monkeypatch.setattr(limits, "REQUEST_STOPS", 2)
    assert "at most 3 pictures" in refused(server, post(said(*[shown(b"none")] * 4)), 400)["message"]
    assert "at most 2 texts" in refused(server, post(said(text("a"), stop=["a", "b", "c"])), 400)["message"]


def test_sizes_of_pictures(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REQUEST_PICTURE_BYTES", 5000)
    monkeypatch.setattr(limits, "REQUEST_PIXELS", 1_000_000)
    noise = io.BytesIO()
    Image.effect_noise((80, 80), 90).save(noise, "PNG")
    assert refused(server, post(said(text("?"), shown(noise.getvalue()))), 400)["code"] == "image_too_large"
    assert "at most 1 megapixels" in refused(server, post(said(text("?"), *[shown(png(600))] * 3)), 400)["message"]


def test_pixels_count_whatever_size_a_decoder_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was taken over, or that has made them few."""
    monkeypatch.setattr(limits, "REQUEST_PIXELS", 25_000)
    for image, size in (((100, 100), (1, 1)), ((1, 1), (100, 100))):
        picture = Picture("a", Image.new("RGB", image), "", original_size=size)
        opener = PictureOpener(lambda name, data: picture, {}, False, lambda: True)  # noqa: B023
        for _ in range(2):
            assert opener("data:,", "picture 1") is picture
        with pytest.raises(ApiError, match="megapixels"):
            opener("data:,", "picture 1")


@for_each("head", ["data:", "data:a/b", "data:;", "http", "data:image/png;a=b;c="], own=(server,))
def test_addresses_that_take_long_to_look_through(head: str, server: Endpoint) -> None:
    part = {"type": "image_url", "image_url": {"url": head + "a" * 10_000_000}}
    assert refused(server, post(said(text("?"), part)), 400)["code"] == "invalid_image_url"


def test_questions_in_many_messages_take_no_time_squared(server: Endpoint) -> None:
    message = {"role": "user", "content": "hm? " * 20}
    error = refused(server, post(json.dumps({"messages": [message] * 12_000}).encode()), 400)
    assert error["code"] == "context_length_exceeded"


def test_long_names_are_cut(server: Endpoint) -> None:
    error = refused(server, post(said(text("a"), model="m" * 1_000_000)), 404)
    assert len(error["message"]) < limits.NAME_CHARACTERS + 100


# Connections.


def test_one_connection_too_many(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    with ExitStack() as stack:
        for _ in range(3):
            connection = stack.enter_context(closing(connected(server, HEALTH)))
            assert response(connection)[0] == 200
        for request in (b"", HEALTH, post(b" " * 1_000_000)):  # whatever it says, and whether it does
            turned_away = stack.enter_context(closing(connected(server, request)))
            status, headers, body = response(turned_away)
            assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
            assert body["error"]["code"] == "too_many_connections"
            assert turned_away.recv(1) == b""
        for _ in range(5):  # the user's own are not counted
            with closing(connected(server, HEALTH, own=True)) as connection:
                assert response(connection)[0] == 200
    while response(connected(server, HEALTH))[0] != 200:  # until the server has seen that they left
        pass


def test_an_answer_that_nobody_takes_is_not_kept(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WRITE_SECONDS", 0.5)
    with closing(socket.socket()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        metrics = HEALTH.replace(b"health", b"metrics")
        with pytest.raises(OSError):
            while True:
                connection.sendall(metrics * 100)
        assert server.ask("/health")[0] == 200


def test_a_stream_that_nobody_takes_gives_its_place_back(
    server: Endpoint, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WRITE_SECONDS", 0.5)
    word = "a" * 200_000  # which each event repeats
    monkeypatch.setattr("llava_cli.server.chat_response.ChatResponse._logprob", lambda *_: {"token": word})
    request = post(said(text("what is this?"), stream=True, logprobs=True, top_logprobs=20, max_tokens=50))
    with closing(connected(server, request)):
        server.until_running(1)
        server.until_running(0)


@for_each(
    ("request_", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 101 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"a:\r\n" * 60_000, 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\na: " + b"a" * 60_000, 431),
        (b"GET /" + b"a" * 60_000, 431),
        (HEALTH.replace(b"\r\n\r\n", b"\r\n") + b"a:\n" * 101 + b"\n", 431),
    ],
    own=(server,),
)
def test_heads_have_few_short_lines(request_: bytes, status: int, server: Endpoint) -> None:
    assert limits.HEAD_FIELDS == 100
    assert limits.HEAD_BYTES < 60_000
    assert refused(server, request_, status)["message"]


def test_small_chunks_are_refused(server: Endpoint) -> None:
    """To parse one takes as long as to look at 5 kB of what is in them."""
    assert limits.BODY_CHUNK_BYTES > 1
    assert "chunks" in refused(server, CHUNKED + b"1\r\n \r\n" * 10_000, 400)["message"]
    assert "no HTTP" in refused(server, CHUNKED + b"1;" + b"a" * 60_000, 431)["message"]
    body = said(text("what is this?"))
    pieces = [body[i : i + 9] for i in range(0, len(body), 9)]  # few of them are no harm
    request = CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    with closing(connected(server, request)) as connection:
        assert response(connection)[0] == 200


def test_who_is_refused_hears_it_though_it_is_still_sending(server: Endpoint) -> None:
    with closing(connected(server, post(b"[" * 100, length=30_000_000))) as connection:
        connection.sendall(b" " * 20_000_000)
        assert response(connection)[0] == 400


def test_but_is_not_listened_to_for_ever(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINGER_SECONDS", 0.2)
    for request in (post(b"[" * 100, length=10**7), b"hello\r\n\r\n"):
        with closing(connected(server, request)) as connection:
            assert response(connection)[0] == 400
            with pytest.raises(OSError):
                while True:
                    connection.sendall(b" ")


def test_what_is_wrong_does_not_fill_the_log(server: Endpoint, capfd: pytest.CaptureFixture[str]) -> None:
    upgrade = b"\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"
    malformed = CHUNKED.replace(b"localhost", b"evil.example") + b"zz\r\n"
    for request in (malformed, b"hello\r\n\r\n\0", HEALTH.replace(b"\r\n\r\n", upgrade)):
        with closing(connected(server, request)) as connection:
            assert response(connection)[0] in (200, 400)
    assert capfd.readouterr().err == ""


# Work.


def test_what_is_not_wanted_any_more_is_not_tokenized(engine: LocalEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from llava_cli import Conversation, Sampling

    generation = GenerationService(engine)
    monkeypatch.setattr(engine, "prepare", lambda *_: pytest.fail("it was looked at"))
    with pytest.raises(ClientGone):
        generation.submit(Request(Conversation().ask("a"), Sampling()), print, is_wanted=lambda: False)
    generation.close()


def test_who_leaves_while_it_waits_is_not_looked_at(
    server: Endpoint, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some requests are being prepared; others come, wait, and leave: with a text alone, and with a picture."""
    prepare, questions, go_on = engine.prepare, list[str](), threading.Event()

    def slow(number: int, request: Request, *options: Any) -> Any:
        questions.append(request.conversation.turns[0].question)
        assert go_on.wait(60)
        return prepare(number, request, *options)

    monkeypatch.setattr(engine, "prepare", slow)
    with ExitStack() as stack:
        for content in ([text("first")], [text("first"), shown(png())]):
            for _ in range(8):  # as many as are prepared at a time, and more
                stack.enter_context(closing(connected(server, post(said(*content)))))
        server.until_running(16)
        for content in ([text("late")], [text("late"), shown(png())]):
            with closing(connected(server, post(said(*content)))):
                server.until_running(17)
            server.until_running(16)
        go_on.set()
        server.until_running(0)
    assert set(questions) == {"first"}


def test_slow_pictures_are_not_in_the_way(
    hooked: Path, engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than there are processes to decode them, each a few bytes, are still at it when another one is answered."""
    monkeypatch.setattr(limits, "QUICK_DECODE_SECONDS", 0.3)
    monkeypatch.setattr(limits, "SERVED_DECODE_SECONDS", 600.0)
    with in_thread(engine, tmp_path) as server, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(closing(connected(server, post(said(text("what?"), shown(b"HOLD"))))))
        server.until_running(8)
        with closing(connected(server, post(SMALL))) as connection:
            assert response(connection)[0] == 200
        assert server.metric("llava_requests_running") == 8


def test_a_picture_that_takes_too_long_is_refused_in_the_end(
    hooked: Path, engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "QUICK_DECODE_SECONDS", 0.1)
    monkeypatch.setattr(limits, "SERVED_DECODE_SECONDS", 0.2)
    with in_thread(engine, tmp_path) as server:
        assert refused(server, post(said(text("what?"), shown(b"HOLD"))), 400)["code"] == "invalid_image"


def url(number: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"http://example.com/{number}.png"}}


def test_slow_addresses_are_not_in_the_way(
    engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are fetched at a time wait, and who brings a picture is answered, as who asks a text."""
    monkeypatch.setattr(limits, "FETCHES", 2)
    go_on, fetched = threading.Event(), list[str]()

    def slow(address: str, public: bool) -> bytes:
        assert public
        fetched.append(address)
        assert go_on.wait(60)
        return png()

    monkeypatch.setattr(pictures, "fetch", slow)
    with in_thread(engine, tmp_path, remote=True) as server, ExitStack() as stack:
        several = [
            stack.enter_context(closing(connected(server, post(said(text("?"), url(n), url(n), url(n + 100))))))
            for n in range(5)
        ]
        server.until_running(5)
        for body in (SMALL, said(text("what is this?"))):
            with closing(connected(server, post(body))) as connection:
                assert response(connection)[0] == 200
        assert len(fetched) == limits.FETCHES
        go_on.set()
        assert [response(connection)[0] for connection in several] == [200] * 5
    assert len(fetched) == len(set(fetched)) == 10  # one that is shown twice is fetched once


@pytest.mark.parametrize("name", ["BODY_BYTES", "BODY_SECONDS"])
def test_all_addresses_of_a_request_have_one_limit(
    name: str, engine: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def fetch(address: str, public: bool) -> bytes:
        if name == "BODY_SECONDS" and "1.png" in address:
            go_on.wait(60)
            raise InputMissing(address, "no answer")
        return b"a" * 600

    monkeypatch.setattr(pictures, "fetch", fetch)
    request = post(said(text("?"), url(0), url(1)))
    monkeypatch.setattr(limits, name, 1000 if name == "BODY_BYTES" else 0.5)
    with in_thread(engine, tmp_path, remote=True) as server:
        error = refused(server, request, 400)
        go_on.set()
    assert error["param"] == "messages"
    assert "together" in error["message"]


def test_answers_with_many_probabilities_are_made_in_a_thread(
    server: Endpoint, engine: LocalEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their tokens' words is decoded once, though thousands are told."""
    threads = set[str]()
    shapes = "llava_cli.server.chat_response.ChatResponse._logprobs"
    from llava_cli.server.chat_response import ChatResponse

    made: Callable[..., Any] = ChatResponse._logprobs
    monkeypatch.setattr(shapes, lambda *words: [threads.add(threading.current_thread().name), made(*words)][1])
    answer = server.client().chat.completions.create(
        model="builtin", messages=[{"role": "user", "content": "what is this?"}], logprobs=True, top_logprobs=20
    )
    assert answer.choices[0].logprobs
    assert not any("serve" in name for name in threads)
    assert all("AnyIO" in name for name in threads)
