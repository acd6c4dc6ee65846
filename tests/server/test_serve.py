"""`llava serve` as OpenAI's own client, a browser and a shell meet it."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import openai
import pytest
from helpers.command import Run, Shell
from helpers.servers import Serve, Server, begin, end
from helpers.tables import for_each
from PIL import Image, ImageDraw

from llava_cli import Conversation, load
from llava_cli.conversation import Picture
from llava_cli.engine.local import LocalEngine
from llava_cli.engine.remote.local_socket import UnixHTTPConnection, server_info
from llava_cli.images.decode import decode

JSON = {"Content-Type": "application/json"}
QUESTIONS = ("what is this?", "what color is the circle?", "is there a square?", "how many shapes are there?")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One with the built-in model, for all that leaves it as it was."""
    running = begin(tmp_path_factory.mktemp("server"))
    yield running
    assert end(running) == 0
    assert not running.socket.exists()


@pytest.fixture(scope="module")
def engine() -> LocalEngine:
    return load("builtin", precision="fp32", device="cpu")


def drawing(number: int) -> bytes:
    """A circle and a square, somewhere, of some colors, as a PNG."""
    image, rng = Image.new("RGB", (224, 224), "white"), Random(number)
    pen, colors = ImageDraw.Draw(image), rng.sample(["red", "blue", "green", "orange", "purple"], 2)
    x, y = rng.randrange(10, 50), rng.randrange(10, 120)
    pen.ellipse((x, y, x + 60, y + 60), fill=colors[0])
    pen.rectangle((x + 90, y, x + 150, y + 60), fill=colors[1])
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def shown(data: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {
        "type": "image_url",
        "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"},
    }


def said(text: str, *pictures: bytes) -> dict[str, Any]:
    return {"role": "user", "content": [*map(shown, pictures), {"type": "text", "text": text}]}


def picture(data: bytes) -> Picture:
    return Picture("", decode(data, "")[0], "")


def test_an_answer_is_that_of_ask(server: Server, engine: LocalEngine) -> None:
    answer = server.client().chat.completions.create(model="builtin", messages=[said(QUESTIONS[0], drawing(0))])
    expected = engine.answer(Conversation().ask(QUESTIONS[0], [picture(drawing(0))]))
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.answer_tokens
    assert answer.model == "builtin"
    assert [model.id for model in server.client().models.list()] == ["builtin"]
    assert server.client().models.retrieve("builtin").id == "builtin"


def test_an_answer_comes_in_pieces(server: Server, engine: LocalEngine) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="builtin",
            messages=[{"role": "system", "content": "Be brief."}, said(QUESTIONS[0], drawing(1))],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    expected = engine.answer(Conversation(system="Be brief.").ask(QUESTIONS[0], [picture(drawing(1))]))
    assert "".join(text) == expected.text
    assert len([piece for piece in text if piece]) > 3
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == expected.answer_tokens


def test_two_pictures_and_words_of_several_messages(server: Server, engine: LocalEngine) -> None:
    """Two messages of a user's in a row are one question, unless a picture would come to stand before another text."""
    shown = [picture(drawing(1)), picture(drawing(2))]
    for messages, talk in (
        ([said("look:", drawing(1)), said(QUESTIONS[0])], Conversation().ask(f"look:\n{QUESTIONS[0]}", shown[:1])),
        (
            [said("look:", drawing(1)), said(QUESTIONS[0], drawing(2))],
            Conversation().ask("look:", shown[:1]).ask(QUESTIONS[0], shown[1:]),
        ),
    ):
        answer = server.client().chat.completions.create(model="builtin", messages=messages)  # type: ignore[arg-type]
        assert answer.choices[0].message.content == engine.answer(talk).text


def test_how_it_is_asked(server: Server, engine: LocalEngine) -> None:
    create = server.client().chat.completions.create
    messages = [said(QUESTIONS[0], drawing(3))]
    whole = create(model="builtin", messages=messages).choices[0].message.content or ""
    short = create(model="builtin", messages=messages, max_tokens=3).choices[0]
    assert short.finish_reason == "length"
    assert whole.startswith(short.message.content or "-")
    ended = create(model="builtin", messages=messages, stop=[whole.split()[2]]).choices[0]
    assert ended.message.content == " ".join(whole.split()[:2])
    assert ended.finish_reason == "stop"
    hot = [create(model="builtin", messages=messages, temperature=2, seed=s).choices[0].message.content for s in (5, 5)]
    assert hot[0] == hot[1]
    likely = create(model="builtin", messages=messages, logprobs=True, top_logprobs=2).choices[0].logprobs
    assert likely
    assert likely.content
    assert "".join(one.token for one in likely.content).removesuffix("</s>").strip() == whole
    assert all(one.top_logprobs[0].logprob == one.logprob for one in likely.content)
    assert all(len(one.top_logprobs) == 2 for one in likely.content)


@for_each(
    "part, code",
    [
        (shown(b"<html>no picture"), "invalid_image"),
        (shown(drawing(0)[:200]), "invalid_image"),
        (shown(b""), "invalid_image"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}, "invalid_image_url"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "invalid_image_url"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "invalid_image_url"),
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, "remote_url"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "remote_url"),
    ],
)
def test_a_bad_picture_is_named(part: dict[str, Any], code: str, server: Server) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": "what?"}, shown(drawing(0)), part]}]
    with pytest.raises(openai.BadRequestError) as raised:
        server.client().chat.completions.create(model="builtin", messages=messages)
    assert raised.value.code == code
    assert "picture 2" in raised.value.message
    assert "/etc" not in raised.value.message


def test_a_picture_that_takes_its_decoder_down(serve: Serve, hooked: Path) -> None:
    client = serve().client()

    def ask(data: bytes) -> str:
        messages: Any = [{"role": "user", "content": [{"type": "text", "text": QUESTIONS[1]}, shown(data)]}]
        answer = client.chat.completions.create(model="builtin", messages=messages)
        return str(answer.choices[0].message.content)

    before = ask(drawing(0))
    for _ in range(5):  # more than there are processes
        with pytest.raises(openai.BadRequestError, match="picture 1: crashes its decoder"):
            ask(b"SEGV")
    assert ask(drawing(0)) == before


@for_each(
    "change, error",
    [
        ({"model": "gpt-9"}, openai.NotFoundError),
        ({"messages": []}, openai.BadRequestError),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, openai.BadRequestError),
        ({"messages": [said("a"), {"role": "assistant", "content": "b"}]}, openai.BadRequestError),
        ({"messages": [{"role": "tool", "content": "b", "tool_call_id": "1"}]}, openai.BadRequestError),
        ({"messages": [said("what? " * 5000)]}, openai.BadRequestError),
        ({"temperature": 99}, openai.BadRequestError),
        ({"max_tokens": 0}, openai.BadRequestError),
        ({"n": 2}, openai.BadRequestError),
        ({"top_logprobs": 21, "logprobs": True}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError),
        ({"frequency_penalty": 1.5}, openai.BadRequestError),
        ({"modalities": ["text", "audio"]}, openai.BadRequestError),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError),
    ],
)
def test_what_cannot_be_done_is_refused(
    change: dict[str, Any], error: type[openai.APIStatusError], server: Server
) -> None:
    with pytest.raises(error) as raised:
        server.client().chat.completions.create(**{"model": "builtin", "messages": [said("what is this?")], **change})
    body: Any = raised.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert "Traceback" not in body["message"]


def test_what_changes_nothing_is_taken(server: Server) -> None:
    harmless: Any = {
        "response_format": {"type": "text"},
        "tool_choice": "none",
        "modalities": ["text"],
        "frequency_penalty": 0,
        "user": "me",
    }
    messages: Any = [said("what is this?")]
    assert server.client().chat.completions.create(model="builtin", messages=messages, max_tokens=1, **harmless)


@for_each(
    ("body", "message"),
    [
        (b'{"messages":[{"role":"user","content":[{"type":"image_url","image_url":7}]}]}', "image_url: has to be text"),
        (
            b'{"messages":[{"role":"user","content":[{"type":"video"}]}]}',
            "messages.0.content.0.type: 'video' is not supported",
        ),
        (b'{"messages":[{"role":"user","content":[{"text":"a"}]}]}', "messages.0.content.0.type: is missing"),
        (b'{"messages":[{"role":"user","content":5}]}', "messages.0.content: "),
        (b'{"messages":[{"role":"user","content":"a \\ud800 b"}]}', "no Unicode"),
        (b'{"messages":[{"role":"user","content":"a"}],"model":"\\ud800"}', "?: this server has builtin"),
        (b'{"messages":[{"role":"user","content":"a"}],"stop":5}', "stop: "),
        (b'{"messages":', "the body is no JSON"),
        (b"[1]", "has to be a JSON object"),
    ],
)
def test_what_is_wrong_is_named(body: bytes, message: str, server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/chat/completions", body, JSON)
    answer = connection.getresponse()
    error = json.loads(answer.read())["error"]
    connection.close()
    assert answer.status in (400, 404)
    assert message in error["message"]
    assert "[" not in str(error["param"])


def test_pictures_that_are_large_once_they_are_opened(server: Server) -> None:
    Image.new("1", (7000, 7000)).save(file := io.BytesIO(), "PNG", optimize=True)
    assert len(file.getvalue()) < 20_000
    with pytest.raises(openai.BadRequestError, match="at most 100 megapixels in all pictures together"):
        server.client().chat.completions.create(
            model="builtin",
            messages=[said("what is this?", *[file.getvalue()] * 3)],  # type: ignore[list-item]
        )


def test_a_prompt_of_no_messages(server: Server) -> None:
    with closing(UnixHTTPConnection(server.socket, 60)) as connection:
        connection.request("POST", "/llava/prompt", '{"messages": []}', JSON)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["param"]) == (400, "messages")


def test_what_is_no_request_is_refused_in_the_same_shape(server: Server) -> None:
    for path, method, body, code in (
        ("/v1/chat/completions", "POST", [1], 400),
        ("/v1/chat/completions", "GET", None, 405),
        ("/v1/nothing", "GET", None, 404),
        ("/llava", "GET", None, 404),
        ("/llava/prompt", "POST", {}, 404),
        ("/docs", "GET", None, 404),
    ):
        told, _, answer = server.ask(path, method, body, Content_Type="application/json")
        assert told == code
        assert set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
    assert server.ask("/health")[0] == 200


def test_a_client_that_leaves_frees_its_place(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--max-tokens", "1800")
    stream = server.client().chat.completions.create(model="default", messages=[said("what is this?")], stream=True)
    next(iter(stream))
    assert server.metric("llava_requests_running") == 1
    stream.close()
    server.until_running(0)
    assert server.metric("llava_requests_left_total") == 1
    # And one that asks for a whole answer, and does not wait for it.
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": [said("and this?")]}), JSON)
    server.until_running(1)
    connection.close()
    server.until_running(0)
    assert server.metric("llava_requests_left_total") == 2


def test_sixteen_conversations_at_once(server: Server, engine: LocalEngine) -> None:
    """Each goes on from what was read of it, whoever else asks, and one in twenty requests is no good."""

    def talk(number: int) -> tuple[list[str], int]:
        messages: list[Any] = []
        answers, found = [], 0
        for turn in range(3):
            if (number + turn * 16) % 20 == 7:
                with pytest.raises(openai.BadRequestError):
                    server.client().chat.completions.create(model="builtin", messages=[said("?", b"no picture")])
            messages.append(said(QUESTIONS[(number + turn) % 4], *([drawing(number % 5)] if not turn else [])))
            answer = server.client().chat.completions.create(model="builtin", messages=messages)
            answers.append(answer.choices[0].message.content or "")
            messages.append({"role": "assistant", "content": answers[-1]})
            if answer.usage and answer.usage.prompt_tokens_details:
                found += bool(answer.usage.prompt_tokens_details.cached_tokens)
        return answers, found

    with ThreadPoolExecutor(16) as threads:
        told = list(threads.map(talk, range(16)))
    for number, (answers, found) in enumerate(told):
        conversation = Conversation()
        for turn, answer in enumerate(answers):
            question = QUESTIONS[(number + turn) % 4]
            conversation = conversation.ask(question, [picture(drawing(number % 5))] if not turn else [])
            assert answer == engine.answer(conversation).text
            conversation = conversation.answered(answer)
        assert found >= 2
    assert server.metric("llava_requests_running") == 0
    assert server.metric("llava_kept_bytes") > 0


@for_each(
    "name, value",
    itertools.product(["Host", "Origin"], ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80"]),
)
def test_pages_of_strangers_are_sent_away(name: str, value: str, server: Server) -> None:
    """Those that a browser shows, and those that made a name of their own lead here."""
    told, headers, _ = server.ask("/v1/models", **{name: f"http://{value}" if name == "Origin" else value})
    assert told == 403
    assert not [header for header in headers if header.startswith("access-control")]
    assert server.ask("/v1/models", "OPTIONS", Origin="null")[0] == 403


def test_a_page_that_may_ask_and_a_key(serve: Serve) -> None:
    server = serve("--allow-origin", "https://mine.example", "--allow-host", "box.example", LLAVA_API_KEY="sésame")
    asked = {"Origin": "https://mine.example", "Host": "box.example:8000"}
    told, headers, _ = server.ask("/v1/models", "OPTIONS", **asked)
    assert (told, headers["access-control-allow-origin"]) == (204, "https://mine.example")
    for key, code in (("", 401), ("Bearer", 401), ("Bearer wrong", 401), ("Basic sésame", 401)):
        for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
            told, _, answer = server.ask(path, **asked, **({"Authorization": key} if key else {}))
            assert told == code
            assert json.loads(answer)["error"]["code"] == "invalid_api_key"
    right = "Bearer sésame".encode().decode("latin-1")
    told, headers, _ = server.ask("/v1/models", **asked, Authorization=right)
    assert (told, headers["access-control-allow-origin"]) == (200, "https://mine.example")
    assert server.ask("/health")[0] == 200
    assert server.ask("/v1/models", Origin="https://other.example", Authorization=right)[0] == 403
    # Our own socket is this user's by its mode.
    assert stat.S_IMODE(server.socket.stat().st_mode) == 0o600
    connection = UnixHTTPConnection(server.socket, 10)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    connection.close()


def test_others_are_not_served_without_a_key(run: Run) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.com"):
        result = run("serve", "--host", host)
        assert result.exit_code == 2
        assert "a key is needed" in result.stderr
        assert "LLAVA_API_KEY" in result.stderr


def test_a_body_that_is_too_large(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", "64000001")
    connection.endheaders()
    refused = connection.getresponse()
    assert refused.status == 413
    assert refused.getheader("Connection") == "close"  # and not one that goes on with what is refused
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    piece = b"%x\r\n" % 1_000_000 + b" " * 1_000_000 + b"\r\n"
    try:
        for _ in range(66):
            connection.send(piece)
        connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # it has heard enough
    else:
        assert connection.getresponse().status == 413
    connection.close()
    assert server.ask("/health")[0] == 200


def test_too_many_wait(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--max-tokens", "1800", "--queue", "1")
    stream = server.client().chat.completions.create(model="default", messages=[said("what is this?")], stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError) as raised:
        server.client().chat.completions.create(model="default", messages=[said("and this?")])
    assert raised.value.response.headers["retry-after"] == "1"
    stream.close()
    answer = server.client(max_retries=9).chat.completions.create(
        model="default", messages=[said("and this?")], max_tokens=2
    )
    assert answer.choices[0].message.content is not None


def test_answers_in_hand_are_finished_when_it_is_to_stop(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--max-tokens", "600", "--drain", "600")
    stream = iter(
        server.client().chat.completions.create(model="default", messages=[said("what is this?")], stream=True)
    )
    next(stream)
    server.process.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.choices[0].finish_reason in ("stop", "length")
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert not server.socket.exists()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_no_longer_than_they_may_take(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--max-tokens", "1900", "--drain", "1")
    create = server.client().chat.completions.create
    streams = [iter(create(model="default", messages=[said("what is this?")], stream=True)) for _ in range(8)]
    for stream in streams:
        next(stream)
    server.process.send_signal(signal.SIGTERM)
    server.process.send_signal(signal.SIGINT)  # told twice
    server.process.communicate(timeout=60)
    assert not server.socket.exists()


def test_told_twice_it_stops_at_once_and_without_noise(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    server = serve("-m", checkpoint("llava-llama"), "--max-tokens", "1900")
    stream = server.client().chat.completions.create(model="default", messages=[said("what?")], stream=True)
    next(iter(stream))
    server.process.terminate()
    while server_info(server.socket):  # until it takes no more
        pass
    server.process.terminate()
    errors = server.process.communicate(timeout=60)[1]
    assert server.process.returncode in (0, -signal.SIGTERM)  # the latter where it had ended its answer by then
    assert errors == ""
    assert not server.socket.exists()


@pytest.mark.cold
def test_ctrl_c_is_ignored_where_it_was(serve: Serve, checkpoint: Callable[[str], Path]) -> None:
    """As it is in what a script runs with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server = serve("-m", checkpoint("llava-llama"))
    finally:
        signal.signal(signal.SIGINT, before)
    for _ in range(2):  # one would let answers finish, a second one end it
        server.process.send_signal(signal.SIGINT)
    create = server.client().chat.completions.create
    assert (
        create(model="default", messages=[said("what is this?")], max_tokens=2).choices[0].message.content is not None
    )


def test_one_goes_on_in_the_background_until_it_is_told(shell: Shell, tmp_path: Path) -> None:
    environment = {**os.environ, "LLAVA_SOCKET": str(tmp_path / "run" / "server.sock")}
    assert shell("serve", "--status", env=environment).returncode == 1
    begun = shell("serve", "--detach", "--port", "0", "-p", "fp32", env=environment)
    assert begun.returncode == 0, begun.stderr
    assert b"builtin fp32 cpu on http://127.0.0.1:" in begun.stdout
    try:
        assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
        told = json.loads(shell("serve", "--status", "--json", env=environment).stdout)
        assert told["model"] == "builtin"
        again = shell("serve", "--port", "0", env=environment)
        assert again.returncode == 73
        assert b"builtin is being served" in again.stderr
        assert b"llava serve --stop" in again.stderr
    finally:
        stopped = shell("serve", "--stop", env=environment)
    assert stopped.returncode == 0
    assert stopped.stdout.startswith(b"stopped: builtin")
    assert shell("serve", "--stop", env=environment).stdout == b"no server is running\n"


def test_one_that_cannot_begin_says_why(shell: Shell, tmp_path: Path) -> None:
    environment = {**os.environ, "LLAVA_SOCKET": str(tmp_path / "server.sock")}
    result = shell("serve", "--detach", "-m", "nobody/has-this", env=environment)
    assert result.returncode == 69
    assert result.stderr.startswith(b"llava: nobody/has-this: ")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = shell("serve", "--port", str(taken.getsockname()[1]), env=environment)
    assert result.returncode == 73
    assert b"llava serve --port N" in result.stderr
    result = shell("serve", "--host", "192.0.2.1", env={**environment, "LLAVA_API_KEY": "a"})  # nobody's address
    assert result.returncode == 73
    assert b"llava serve --host 127.0.0.1" in result.stderr
    assert not (tmp_path / "server.sock").exists()


def test_nobody_asks_for_a_while(serve: Serve) -> None:
    server = serve("--idle", "0.5s")
    server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert not server.socket.exists()


def test_a_socket_that_was_left_behind(serve: Serve, tmp_path: Path) -> None:
    """By a server that was killed."""
    server = serve()
    server.process.kill()
    server.process.communicate()
    assert server.socket.exists()
    assert server_info(server.socket) is None
    assert serve().ask("/health")[0] == 200


@for_each("words", [("--idle", "soon"), ("--drain", "-1"), ("--queue", "0"), ("--port", "70000")])
def test_bad_options(words: tuple[str, ...], run: Run) -> None:
    assert run("serve", *words).exit_code == 2


def test_one_that_does_not_answer_yet_keeps_its_place(serve: Serve, shell: Shell, tmp_path: Path) -> None:
    """Nor any more: another one can neither take its socket nor leave it without."""
    server = serve()
    server.process.send_signal(signal.SIGSTOP)
    environment = {**os.environ, "LLAVA_SOCKET": str(server.socket)}
    try:
        other = shell("serve", "--port", "0", env=environment)
        assert other.returncode == 73
        assert f"a server is beginning or ending there (pid {server.process.pid})" in other.stderr.decode()
        assert shell("serve", "--port", "0", "--detach", env=environment).returncode == 73
        assert f"(pid {server.process.pid})" in shell("serve", "--status", env=environment).stdout.decode()
        assert shell("serve", "--stop", env=environment).returncode == 73
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert (server_info(server.socket) or {})["pid"] == server.process.pid


@for_each("words, taken", itertools.product([(), ("--detach",)], ["server.sock", "run"]))
def test_a_place_where_no_socket_can_be(taken: str, words: tuple[str, ...], shell: Shell, tmp_path: Path) -> None:
    """It is not taken for a server's, and the file that is there stays."""
    (tmp_path / taken).write_text("mine")
    socket_path = tmp_path / ("run/server.sock" if taken == "run" else taken)
    result = shell("serve", "--port", "0", *words, env={**os.environ, "LLAVA_SOCKET": str(socket_path)})
    assert result.returncode == 73
    assert result.stderr.startswith(f"llava: {socket_path}: ".encode())
    assert b"LLAVA_SOCKET=PATH names another one" in result.stderr
    assert b"a server is beginning" not in result.stderr
    assert (tmp_path / taken).read_text() == "mine"
