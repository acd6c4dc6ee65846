"""What servers send back: of any shape and size, at any speed. An answer, or one line that says what is wrong."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.command import Run
from helpers.peer import Peer, Reply, delta, say, serving, stream
from helpers.tables import for_each

from llava_cli import limits, render
from llava_cli.bounded_http import Deadline, Response
from llava_cli.conversation import Conversation
from llava_cli.engine.base import Answer, Request
from llava_cli.engine.remote import local_server_engine, remote_engine
from llava_cli.engine.remote.openai_client import OpenAIClient
from llava_cli.engine.remote.openai_response import RetryableError
from llava_cli.engine.remote.remote_engine import RemoteEngine
from llava_cli.errors import LlavaError
from llava_cli.settings import Sampling

QUESTION = "what color is the circle?"
ASKED = Conversation().ask(QUESTION, [])
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}
WHOLE = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1700000000,
    "model": "its-model",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "red"}, "finish_reason": "stop"}],
    "usage": USAGE,
}
EVENTS = [
    {"id": "1", "choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
    {"id": "1", "choices": [{"index": 0, "delta": {"content": "re"}, "logprobs": None, "finish_reason": None}]},
    {"id": "1", "choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "d"}]}}]},
    {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    {"id": "1", "choices": [], "usage": USAGE},
]
ERROR = {"error": {"message": "prompt: too long", "type": "invalid_request_error", "param": None, "code": "x"}}
MODELS = {"object": "list", "data": [{"id": "its-model", "object": "model", "owned_by": "llava"}]}
JUNK: list[Any] = [
    *[None, True, False, 0, -1, 7, 400, 599, 3.5, 1e308, float("nan"), float("inf"), 10**30, -(10**30)],
    *["", " ", "7", "nan", "\n\n", "\x1b]0;owned\x07", "\u202e", "\x9b2J", "\ud800", "\udfff\ud800", "x" * 5000],
    *[[], {}, [None], [[]], [{}], {"a": None}, [1] * 300, [{"type": "text", "text": "part"}], [{"type": "text"}]],
    *[[{"type": "text", "text": 7}], [{"type": [], "text": {}}], ["text"], {"text": "part"}, {"error": {"code": 401}}],
    json.loads("[" * 30 + "]" * 30),
    json.loads("[" * 100 + "]" * 100),
]


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Peer]:
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    monkeypatch.setattr(remote_engine, "MAX_ATTEMPTS", 2)
    with serving() as it:
        yield it


def mutated(value: Any, rng: Random) -> Any:
    """A copy in which something is missing, doubled, wrapped, or something else."""
    value = [copy.deepcopy(value)]
    places: list[tuple[Any, Any]] = [(value, 0)]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, dict):
            places += [(inner, name) for name in inner]
        elif isinstance(inner, list):
            places += [(inner, at) for at in range(len(inner))]
    holder, key = rng.choice(places)
    change = rng.randrange(6)
    if change == 0 and holder is not value:
        del holder[key]
    elif change == 1:
        holder[key] = [holder[key]]
    elif change == 2:
        holder[key] = {"content": holder[key]}
    else:
        holder[key] = copy.deepcopy(rng.choice(JUNK))
    return value[0]


def garbled(data: bytes, rng: Random) -> bytes:
    """Bytes of which some are missing, twice there or others."""
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    middle = rng.choice(
        [b"", data[begin:end] * 2, bytes(rng.randrange(256) for _ in range(3)), b"\r\n", b"\0", b"}", b"["]
    )
    return data[:begin] + middle + data[end:]


def event_stream(events: Any) -> bytes:
    events = events if isinstance(events, list) else [events]
    lines = [": hello", *(f"data: {json.dumps(event)}" for event in events), "data: [DONE]"]
    return "".join(f"{line}\n\n" for line in lines).encode()


def head(size: int, status: int = 200) -> bytes:
    return f"HTTP/1.1 {status} It\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()


def client_of(data: bytes) -> OpenAIClient:
    """A client of a server that sends these very bytes and hangs up."""

    def post(path: str, body: dict[str, Any]) -> Response:
        ours, theirs = socket.socketpair()
        with theirs:
            theirs.sendall(data)
        try:
            return Response(ours, Deadline(60), "POST")
        except OSError as error:
            ours.close()
            raise RetryableError(str(error)) from None

    return OpenAIClient("its", post, lambda picture: picture.name)


def check(ask: Callable[[], Answer]) -> bool:
    """Whether there is an answer; it is right in form, or the error is one line."""
    try:
        answer = ask()
    except (LlavaError, RetryableError) as error:
        assert str(error).isprintable(), ascii(str(error))
        assert 0 < len(str(error)) < 3 * limits.NAME_CHARACTERS
        return False
    answer.text.encode()
    assert answer.finish_reason in ("stop", "length")
    for tokens in (answer.prompt_tokens, answer.answer_tokens, answer.cached_tokens):
        assert type(tokens) is int
        assert 0 <= tokens <= limits.REPLY_TOKENS
    return True


def whole(client: OpenAIClient) -> Answer:
    return client.complete(Request(ASKED, Sampling()))


def streamed(client: OpenAIClient) -> Answer:
    chunks = list(client.stream(ASKED, Sampling()))
    answer = chunks[-1].answer
    assert answer
    assert "".join(chunk.text for chunk in chunks) == answer.text
    return answer


def test_what_is_mutated_is_right_before() -> None:
    for answer in (
        whole(client_of(head(len(data := json.dumps(WHOLE).encode())) + data)),
        streamed(client_of(head(len(data := event_stream(EVENTS))) + data)),
    ):
        assert (answer.text, answer.finish_reason) == ("red", "stop")
        assert (answer.prompt_tokens, answer.cached_tokens, answer.answer_tokens) == (7, 2, 3)


def test_no_answer_is_a_traceback() -> None:
    rng, answers = Random(3), 0
    for _ in range(1200):
        said = mutated(mutated(WHOLE, rng), rng)
        data = json.dumps(said).encode()
        answers += check(lambda data=data: whole(client_of(head(len(data)) + data)))  # type: ignore[misc]
    assert 100 < answers < 1100


def test_no_stream_is_a_traceback() -> None:
    rng, answers = Random(4), 0
    for _ in range(1200):
        data = event_stream(mutated(EVENTS, rng) if rng.random() < 0.9 else [mutated(ERROR, rng)])
        answers += check(lambda data=data: streamed(client_of(head(len(data)) + data)))  # type: ignore[misc]
    assert 100 < answers < 1100


def test_no_bytes_are_a_traceback() -> None:
    """Neither those of the body nor those of the head."""
    rng = Random(5)
    for _ in range(600):
        for ask, body in ((whole, json.dumps(WHOLE).encode()), (streamed, event_stream(EVENTS))):
            data = garbled(head(len(body)) + body, rng) if rng.random() < 0.5 else head(9999) + garbled(body, rng)
            check(lambda ask=ask, data=data: ask(client_of(data)))  # type: ignore[misc]


def test_no_error_is_a_traceback() -> None:
    rng = Random(6)
    for _ in range(600):
        data = json.dumps(mutated(mutated(ERROR, rng), rng)).encode()
        data = garbled(data, rng) if rng.random() < 0.3 else data
        for ask in (whole, streamed):
            status = rng.choice([400, 401, 404, 413, 422, 429, 500, 503, 302, 304, 204, 999])
            assert not check(lambda ask=ask, data=data, status=status: ask(client_of(head(len(data), status) + data)))  # type: ignore[misc]


def as_it_is(data: bytes) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.close_connection = True
        handler.wfile.write(data)

    return reply


def test_no_server_is_a_traceback(peer: Peer) -> None:
    """What lists models, what answers and what fails, over real connections."""
    rng, told = Random(7), []
    for _ in range(300):
        peer.models = say(200, mutated(mutated(MODELS, rng), rng))
        peer.usual = rng.choice(
            [
                say(200, mutated(WHOLE, rng)),
                say(rng.choice([400, 500]), mutated(ERROR, rng), Retry_After=rng.choice(["0", "x", "-1", "nan"])),
                lambda handler, asked: handler.wfile.write(
                    b"HTTP/1.1 200 OK\r\n\r\n" + event_stream(mutated(EVENTS, rng))
                ),
            ]
        )

        def ask() -> Answer:
            engine = RemoteEngine(peer.url, None, rng.choice([None, "its"]), 1, told.append)
            assert engine.model.isprintable()
            requests = [Request(ASKED, Sampling())]
            if rng.random() < 0.5:
                return engine.answer(ASKED)
            ((_, outcome),) = engine.answer_many(requests)
            if isinstance(outcome, LlavaError):
                raise outcome
            return outcome

        check(ask)
    assert all(line.isprintable() for line in told)


@for_each(
    ("choice", "text"),
    [
        (
            {
                "message": {
                    "content": [{"type": "text", "text": " a "}, {"type": "image"}, {"type": "text", "text": "b"}]
                }
            },
            "a b",
        ),
        ({"message": {"content": None}, "finish_reason": None}, ""),
        ({"message": {}}, ""),
        ({"message": {"content": "half \ud83d of one"}}, "half \ufffd of one"),
        ({"message": {"content": "\ud83d\ude42"}}, "🙂"),
    ],
)
def test_content(choice: dict[str, Any], text: str) -> None:
    data = json.dumps({"choices": [choice]}).encode()
    assert whole(client_of(head(len(data)) + data)).text == text
    data = event_stream([{"choices": [{"delta": choice["message"]}]}])
    assert streamed(client_of(head(len(data)) + data)).text == text


@for_each("count", ["7", 7.0, -1, True, None, [], 10**12, float("nan")])
def test_a_count_that_is_none_is_not_shown(count: Any) -> None:
    usage = {"prompt_tokens": count, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}
    for strange in (usage, count, [usage]):
        data = json.dumps({**WHOLE, "usage": strange}).encode()
        answer = whole(client_of(head(len(data)) + data))
        assert (answer.prompt_tokens, answer.answer_tokens, answer.cached_tokens) == (0, 0, 0)
    answer = streamed(client_of(head(len(data := event_stream([*EVENTS[:4], {"usage": usage}]))) + data))
    assert (answer.prompt_tokens, answer.answer_tokens) == (0, 2)
    assert limits.REPLY_TOKENS < 10**12


# Size.


class Flood:
    """Sends `begin`, and `more` for as long as anybody takes it; counts the bytes."""

    def __init__(self, begin: bytes, more: bytes, status: int = 200, **headers: str) -> None:
        self.begin, self.more, self.status, self.headers = begin, more, status, headers
        self.sent, self.over = 0, threading.Event()

    def __call__(self, handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.close_connection = True
        if self.status:
            handler.send_response(self.status)
            for name, value in self.headers.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
        try:
            handler.wfile.write(self.begin)
            while self.sent < 300_000_000:
                self.sent += handler.wfile.write(self.more)
        except OSError:
            pass
        self.over.set()


STRANGE = "does not speak OpenAI's chat completions\n"
EMPTY = b'data: {"choices": []}\n\n'


@for_each(
    ("flood", "words"),
    [
        (Flood(b'data: {"x": "', b"a" * 65536), "its answer is refused: a line longer than 4 MB\n"),
        (Flood(b"", b": still here\n\n" * 4000), "its answer is refused: larger than 5 MB\n"),
        (Flood(b"", EMPTY * 2000), "its answer is refused: larger than 5 MB\n"),
        (Flood(b"", b"\n" * 65536), "its answer is refused: larger than 5 MB\n"),
        (Flood(b"", b"a" * 65536, 400), "status 400\n"),
        (Flood(b'{"error": "', b"a" * 65536, 401), "status 401\n"),
        (Flood(b"HTTP/1.1 200 OK\r\nX: ", b"a" * 4096, 0), "headers larger than 65,536 bytes\n"),
        (Flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 100, 0), "does not speak HTTP\n"),
        (
            Flood(b"HTTP/1.1 200 OK\r\n" + (b"X: " + b"y" * 9000 + b"\r\n") * 9, b"X: y\r\n", 0),
            "headers larger than 65,536 b",
        ),
        (
            Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, 0),
            "its answer is refused: headers larger than 65,536 bytes\n",
        ),
        (
            Flood(b"", b"1;" + b"x" * 50_000 + b"\r\n\n\r\n", Transfer_Encoding="chunked"),
            "marks around chunks larger than 10 MB",
        ),
        (Flood(b"data: {}\n\n", b"\0" * 1000 + b"\n"), STRANGE),
        (Flood(b"data: " + b"[" * 100_000, b"\n\n"), "its answer is refused: nested deeper than 72 levels\n"),
        (Flood(b'data: {"choices": [' + b"0," * 1_500_000, b"0]}\n\n"), STRANGE),
        (Flood(b'data: {"choices": [' + b"[]," * 1_300_000, b"0]}\n\n"), "more than 2,000,000 values\n"),
        (Flood(b'data: {"choices": ' + b"9" * 3_000_000, b"}\n\n"), STRANGE),
    ],
    own=(peer,),
)
def test_a_flood_fills_no_memory(
    flood: Flood, words: str, peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLY_BYTES", 5_000_000)
    assert (limits.REPLY_LINE_BYTES, limits.REPLY_HEAD_BYTES) == (4_000_000, 65_536)
    assert (limits.REPLY_DEPTH, limits.REPLY_ITEMS, limits.REPLY_ERROR_BYTES) == (72, 2_000_000, 1_000_000)
    flood.sent = 0
    flood.over.clear()
    peer.usual = flood
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert asked.exit_code in (65, 69)
    assert words in asked.stderr
    assert asked.stdout == ""
    assert flood.over.wait(60)
    assert flood.sent < 100_000_000  # what is more than the limit was on its way
    assert len(peer.asked) == 1


@for_each(
    "encoding, status",
    itertools.product(["gzip", "deflate", "br", "zstd", "GZip", "identity, gzip"], [200, 400]),
    own=(peer,),
)
def test_nothing_is_unpacked(status: int, encoding: str, peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(status, gzip.compress(bytes(50_000_000)), Content_Encoding=encoding)
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert "sends compressed answers, which were not asked for" in asked.stderr or status == 400
    assert asked.exit_code == (69 if status == 200 else 65)
    assert asked.stderr.splitlines()[0].isprintable()
    assert {headers["Accept-Encoding"] for headers in peer.headers} == {"identity"}


def test_models_without_end(peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLY_BYTES", 1_000_000)
    peer.models = Flood(b'{"data": [', b'{"id": "m"},' * 1000)
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert (asked.exit_code, asked.stdout) == (69, "")
    assert "its answer is refused: larger than 1 MB\n" in asked.stderr


def test_as_large_as_it_may_be(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REPLY_BYTES", 500_000)
    monkeypatch.setattr(limits, "REPLY_LINE_BYTES", 100_000)
    data = event_stream([{"choices": [{"delta": {"content": "x" * 99_000}, "finish_reason": "stop"}]}])
    assert len(streamed(client_of(head(len(data)) + data)).text) == 99_000
    long = event_stream([{"choices": [{"delta": {"content": "x" * 101_000}}]}])
    with pytest.raises(LlavaError, match="a line longer than 100,000 bytes"):
        streamed(client_of(head(len(long)) + long))


# Time.


def drip(first: bytes, piece: bytes, stopped: threading.Event) -> Reply:
    def reply(handler: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        handler.close_connection = True
        try:
            handler.wfile.write(first)
            while not stopped.wait(0.01):
                handler.wfile.write(piece)
        except OSError:
            pass

    return reply


OK = b"HTTP/1.1 200 OK\r\n"


@for_each(
    ("first", "piece"),
    [
        (b"", b"H"),
        (OK, b"X: y\r\n"),
        (OK + b"X: ", b"y"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (OK + b"\r\n", b": still here\n\n"),
        (OK + b"\r\n", b"\n"),
        (OK + b"\r\n", EMPTY),
        (OK + b"\r\n", b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'),
        (OK + b"\r\ndata: ", b" "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 400 Bad\r\n\r\n", b" "),
    ],
    own=(peer,),
)
def test_a_drip_ends(
    first: bytes, piece: bytes, peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever comes, but a word of the answer: the deadline is for all of it together."""
    monkeypatch.setattr(limits, "REPLY_SECONDS", 0.2)
    stopped = threading.Event()
    peer.usual = drip(first, piece, stopped)
    asked = run("ask", "--server", peer.url, "-m", "its", drawing, QUESTION)
    stopped.set()
    assert asked.exit_code == (65 if b"400" in first else 69)
    assert ("status 400\n" if b"400" in first else "no answer within 0 s, 2 times\n") in asked.stderr


def test_a_model_that_thinks_is_waited_for(
    peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words give all of the time again, those that are no answer yet too."""
    monkeypatch.setattr(limits, "REPLY_SECONDS", 5.0)
    restarted = []
    restart = Deadline.restart
    monkeypatch.setattr(Deadline, "restart", lambda self: (restarted.append(self.seconds), restart(self))[1])
    thinking = ["data: " + json.dumps({"choices": [{"delta": {"reasoning_content": "hm"}}]})] * 3
    peer.usual = stream(*thinking, delta("red"), delta(None, "stop"), ": over", EMPTY.decode(), "data: [DONE]")
    assert run("ask", "--server", peer.url, "-m", "its", drawing, QUESTION).stdout == "red\n"
    assert restarted.count(5.0) == 2 + 4  # a new deadline for each of two requests, and words


def test_nobody_is_waited_for_long(run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes connections no more, and TLS that never begins."""
    monkeypatch.setattr(limits, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=1) as listener:
        asked = run("ask", "--server", f"https://127.0.0.1:{listener.getsockname()[1]}", drawing, QUESTION)
    assert (asked.exit_code, asked.stdout) == (69, "")
    assert "/v1: does not answer (" in asked.stderr
    assert "timed out" in asked.stderr


@for_each(
    ("wish", "pause"),
    [("1e308", 120.0), ("-1e308", 0.0), ("NaN", 0.0), ("-inf", 0.0), ("9" * 400, 120.0), ("1e999", 120.0), ("٣", 3.0)],
)
def test_wishes_beyond_reason(wish: str, pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote_engine.time, "sleep", pauses.append)
    monkeypatch.setattr(remote_engine, "FIRST_DELAY", 0.0)
    client = OpenAIClient("its", lambda path, body: None, lambda picture: "")  # type: ignore[arg-type, return-value]
    engine = object.__new__(RemoteEngine)
    engine.where, engine._lock, engine._is_healthy = "its", threading.Lock(), False
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(f"HTTP/1.1 429 Busy\r\nRetry-After: {wish}\r\n\r\n".encode("latin-1", "replace"))
    error = client.error_from(Response(ours, Deadline(60)))
    assert isinstance(error, RetryableError)
    engine._wait(error, 0)
    assert pauses == [pause if wish.isascii() else 0.0]


# Words.

OWNED = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202enot so\nllava: fake: line\r"


def test_a_models_name_gives_no_orders(peer: Peer, run: Run, drawing: Path, tmp_path: Path) -> None:
    """It is asked for as it is, and shown as it may be."""
    peer.models = say(200, {"data": [{"id": OWNED}]})
    asked = run("ask", "--server", peer.url, "--stats", drawing, QUESTION)
    assert (asked.stdout, asked.exit_code) == ("red\n", 0)
    (line,) = asked.stderr.splitlines()
    assert line.isprintable()
    assert line.startswith("\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202enot so · http")
    assert peer.asked[0]["model"] == OWNED
    (tmp_path / "photos").mkdir()
    drawing.rename(tmp_path / "photos" / "drawing.png")
    run("batch", "--server", peer.url, tmp_path / "photos", QUESTION, "-o", tmp_path / "out.jsonl")
    (row,) = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert json.loads(row)["model"].isprintable()


def test_a_long_name_is_cut_where_it_is_shown(peer: Peer, run: Run, drawing: Path) -> None:
    peer.models = say(200, {"data": [{"id": "m" * 10_000}]})
    asked = run("ask", "--server", peer.url, "--stats", drawing, QUESTION)
    assert asked.stderr.startswith("m" * (limits.NAME_CHARACTERS - 1) + "… · ")
    assert peer.asked[0]["model"] == "m" * 10_000


def test_many_models(peer: Peer, run: Run, drawing: Path) -> None:
    peer.models = say(200, {"data": [{"id": OWNED}, {"id": 7}, {"id": None}, {"id": ""}, 5, {"id": "b" * 999}]})
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    first, hint = asked.stderr.splitlines()
    assert first == f"llava: {peer.url}/v1: has several models"
    assert hint.isprintable()
    assert hint.endswith(f"not so, {'b' * (limits.NAME_CHARACTERS - 1)}…")


@for_each(
    "status, form",
    itertools.product(
        [400, 401, 404, 422, 500], [{"error": {"message": OWNED}}, {"error": OWNED}, {"detail": [OWNED]}, OWNED]
    ),
    own=(peer,),
)
def test_an_error_gives_no_orders(status: int, form: Any, peer: Peer, run: Run, drawing: Path) -> None:
    peer.usual = say(status, form if isinstance(form, dict) else form.encode())
    asked = run("ask", "--server", peer.url, drawing, QUESTION)
    assert asked.exit_code in (65, 69)
    lines = asked.stderr.splitlines()
    assert all(line.isprintable() for line in lines)
    assert [line.startswith("llava: ") for line in lines].count(True) == (2 if status == 500 else 1)
    assert not any(line.startswith("llava: fake") for line in lines)


# Where it leads.


@for_each("status", [301, 302, 303, 307, 308], own=(peer,))
def test_the_key_goes_nowhere_else(
    status: int, peer: Peer, run: Run, drawing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAVA_API_KEY", "open-sesame")
    with serving() as other:
        peer.usual = say(status, b"", Location=f"{other.url}/v1/chat/completions?\x1b[2J")
        asked = run("ask", "--server", peer.url, drawing, QUESTION)
        peer.models = say(status, b"", Location=f"{other.url}/v1/models")
        listed = run("ask", "--server", peer.url, drawing, QUESTION)
        assert not other.asked
        assert not other.headers
    for said in (asked, listed):
        assert said.exit_code == 69
        assert f"llava: {peer.url}/v1: redirects to {other.url}/v1/" in said.stderr
        assert said.stderr.splitlines()[0].isprintable()


# The user's own server.

OWN: dict[str, Any] = {
    **{"llava": "1", "model": "m", "precision": "fp32", "device": "cpu", "precisions": ["auto", "fp32"]},
    **{"devices": ["auto", "cpu"], "family": None, "context": 4096, "memory": 5, "pid": 7, "url": ""},
}


class OwnServer:
    """Something at a Unix socket that answers `data` to whatever it is asked."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.recv(65536)
                    connection.sendall(self.data)


@contextmanager
def own_server(path: Path, data: bytes) -> Iterator[OwnServer]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server = OwnServer(data)
        thread = threading.Thread(target=server.serve, args=(listener,))
        thread.start()
        yield server
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(60)


@for_each("name", ["model", "precision", "device", "precisions", "devices", "family", "context", "memory"])
def test_what_the_own_server_says_of_itself(name: str, tmp_path: Path) -> None:
    """Where that is not what it should be, it is no server of ours."""
    wanted = {"llava": "1", "model": "m", "precision": "auto", "device": "auto"}
    data = json.dumps(OWN).encode()
    with own_server(tmp_path / "own.sock", head(len(data)) + data) as server:

        def found() -> Any:
            return local_server_engine.matching_server(dict(wanted), lambda: None, print, tmp_path / "own.sock")  # type: ignore[arg-type, return-value]

        assert found().model == "m"
        for value in (*JUNK, ["fp32"], 10**400):
            data = json.dumps({**OWN, name: value}).encode()
            server.data = head(len(data)) + data
            engine = found()
            assert engine is None or render.stats(Answer("", "stop", 0, 0, 0, 0.0, 0.0), engine).isprintable()
        server.data = head(2) + b"[]"
        assert found() is None


@for_each(
    ("data", "words"),
    [
        (head(9) + b"[1, 2, 3]", "does not speak OpenAI's chat completions"),
        (head(2_000_001) + b"[" * 2_000_001, "its answer is refused: larger than 1 MB"),
        (head(13) + b'{"prompt": 5}', "does not speak OpenAI's chat completions"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000, "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n", "sends compressed answers, which were not asked for"),
    ],
)
def test_the_own_server_is_read_within_bounds(
    data: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REPLY_BYTES", 1_000_000)
    monkeypatch.setattr(limits, "OWN_REPLY_SECONDS", 60.0)
    engine = local_server_engine.LocalServerEngine(tmp_path / "own.sock", OWN, lambda: None, print)  # type: ignore[arg-type, return-value]
    with own_server(tmp_path / "own.sock", data):
        with pytest.raises(LlavaError, match=re.escape(words)):
            engine.count(ASKED)
        with pytest.raises(LlavaError, match=re.escape(words)):
            list(engine.stream(ASKED, Sampling()))


def test_the_own_server_may_not_hang_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OWN_REPLY_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "own.sock"))
        listener.listen()
        told: list[str] = []

        class Loaded(Exception):
            pass

        def load() -> Any:
            raise Loaded

        engine = local_server_engine.LocalServerEngine(tmp_path / "own.sock", OWN, load, told.append)
        with pytest.raises(Loaded):
            engine.count(ASKED)
    assert told == ["llava: serve: no answer within 0 s; going on without it"]
